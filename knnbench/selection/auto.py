"""What ``backend="auto"`` means: the fastest of our own backends by estimate, decided once for each class of shapes.

Nothing is measured, and no library is loaded that the program has not loaded: PyTorch takes seconds to import, and its
threads stay. Peers are left to `fastest_backend`, because their answers do not keep the rules of ours.
"""

import sys

from knnbench.backends import backend_status
from knnbench.errors import BackendUnavailableError, UnsupportedError

from .candidates import lacks
from .problem import Problem
from .wisdom import wisdom

__all__ = ["CANDIDATES", "choose", "forget_choices"]

# By where the data are: in the order of preference where the estimates are alike or absent, with the module that a
# program must have loaded for it to be considered, if any.
CANDIDATES: dict[str, dict[str, str]] = {
    "host": {"numba": "", "numpy": "", "torch": "torch"},
    "device": {"cupy": "", "torch-cuda": "", "numba-cuda": ""},
}

# What an estimate must promise before the preference is left: a shared machine puts single estimates off by a quarter.
GAIN = 1.5

_chosen: dict[tuple[object, ...], tuple[str, dict[str, str]]] = {}


def choose(problem: Problem) -> tuple[str, dict[str, str]]:
    """Choose an own backend by estimate.

    Parameters
    ----------
    problem : Problem

    Returns
    -------
    name : str
    passed_over : dict of str to str
        The backends that were tried before it and do not work, or lack something, and why.

    Raises
    ------
    UnsupportedError, BackendUnavailableError
        If none of those that works has what is asked for, or none works; the text gives every reason.
    """
    names = [name for name, module in CANDIDATES[problem.data_on].items() if not module or module in sys.modules]
    sizes = (_octave(n) for n in (problem.n_queries, problem.n_corpus, problem.n_features, problem.k))
    key = (*problem.group, problem.accuracy, *sizes, *names)
    if key not in _chosen:
        _chosen[key] = _choose(names, problem)
    return _chosen[key]


def forget_choices() -> None:
    """Choose again: the wisdom has changed."""
    _chosen.clear()


def _choose(names: list[str], problem: Problem) -> tuple[str, dict[str, str]]:
    passed_over: dict[str, str] = {}
    works = False
    for name in _ranked(names, problem):
        status = backend_status(name)
        reason = status.reason
        if status.capabilities is not None and status.ok:
            works, reason = True, lacks(status.capabilities, problem.space, problem.accuracy)
        if not reason:
            return name, passed_over
        passed_over[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    kind = UnsupportedError if works else BackendUnavailableError
    raise kind(f"backend 'auto' found none for data on the {problem.data_on}: {reasons}.")


def _ranked(names: list[str], problem: Problem) -> list[str]:
    """Return names, the fastest by estimate first; those without an estimate keep their place among them."""
    seconds: dict[str, float] = {}
    least = float("inf")
    for i, name in enumerate(names):
        costs = wisdom().costs((name, *problem.group))
        guess = costs["call"].predict(problem).cautious * GAIN ** min(i, 1) if costs else least
        seconds[name], least = guess, min(least, guess)
    return sorted(names, key=lambda name: seconds[name])


def _octave(size: int) -> int:
    """Return the class of a size: sizes of one class differ by less than the square root of 2."""
    return 2 * size.bit_length() + (size >> max(0, size.bit_length() - 2) & 1)
