"""Which backends can do a computation, and why the others cannot.

Candidates are asked, in this order, whether they work here, have the metric and the dtype, fit the memory budget, and
are accurate enough, on ordinary and on adversarial data.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from knnbench.backends import backend_status, get_backend
from knnbench.backends.base import Capabilities, PeerSearch
from knnbench.blocking import require_memory
from knnbench.dtypes import Array
from knnbench.errors import OverBudgetError
from knnbench.metrics import Space

from .problem import Problem
from .wisdom import backend_version, wisdom

__all__ = ["Constraints", "errors_of", "lacks", "passing", "sieve"]

# Rows that errors are measured on, and how far the adversarial ones lie from the origin, in units of their spread:
# there a Gram form in float32 loses all digits.
ERROR_QUERIES, ERROR_CORPUS, ERROR_FEATURES, ERROR_K = 16, 400, 48, 5
OFFSET = 1000.0


@dataclass(frozen=True, slots=True)
class Constraints:
    """What a backend must keep.

    Attributes
    ----------
    max_error : float or None
        The largest error allowed, on ordinary and on adversarial data.
    budget : int
        Bytes.
    """

    max_error: float | None
    budget: int


def lacks(capabilities: Capabilities, space: Space, accuracy: str) -> str:
    """Return what a backend lacks for a computation, empty if nothing.

    Examples
    --------
    >>> import numpy as np
    >>> from knnbench.metrics import METRICS
    >>> lacks(Capabilities("cpu", frozenset({"cityblock"})), Space(METRICS["cosine"], np.dtype("f4"), 8), "fast")
    "lacks metric 'cosine' (it has: cityblock)"
    """
    if space.metric.name not in capabilities.metrics:
        return f"lacks metric {space.metric.name!r} (it has: {', '.join(sorted(capabilities.metrics))})"
    if space.dtype.name not in capabilities.dtypes:
        return f"lacks dtype {space.dtype.name} (it has: {', '.join(sorted(capabilities.dtypes))})"
    is_proved = capabilities.exact_integers if space.is_integer else capabilities.certifies
    if accuracy == "exact" and not (is_proved and capabilities.total_order):
        return f"lacks accuracy='exact' for {space.dtype.name} (own backends have it)"
    return ""


def sieve(names: Iterable[str], problem: Problem, constraints: Constraints) -> tuple[list[str], dict[str, str]]:
    """Return the backends that can do a computation, and for each other one the first reason why not.

    Parameters
    ----------
    names : iterable of str
    problem : Problem
    constraints : Constraints
    """
    passed_over = {name: passing(name, problem, constraints) for name in names}
    return [name for name, reason in passed_over.items() if not reason], {n: r for n, r in passed_over.items() if r}


def passing(name: str, problem: Problem, constraints: Constraints) -> str:
    """Return the first reason why a backend cannot do a computation, empty if it can."""
    status, space = backend_status(name), problem.space
    if not status.ok or status.capabilities is None:
        return f"unavailable: {status.reason}"
    reason = lacks(status.capabilities, space, problem.accuracy)
    if not reason and problem.data_on == "device" and status.device != "cuda":
        reason = "computes on the CPU, and the data are on a device"
    return reason or _over_budget(name, problem, constraints.budget) or _too_inexact(name, problem, constraints)


def _over_budget(name: str, problem: Problem, budget: int) -> str:
    """Return why a backend cannot keep a budget: peers tell what they hold, ours refuse one query beforehand."""
    engine, space = get_backend(name), problem.space
    try:
        if problem.op == "pairwise":
            require_memory(problem.n_queries * problem.n_corpus * space.output.itemsize, "the distances")
        if isinstance(engine, PeerSearch):
            needed = sum(engine.held_bytes(1, problem.n_corpus, max(1, problem.k), space))
            return f"needs {needed:,} bytes for one query; the budget is {budget:,}" if needed > budget else ""
        rows = engine.to_native(np.ones((max(1, problem.k), problem.n_features), space.dtype), space.dtype)
        engine.knn(rows[:1], engine.prepare(rows, space), max(1, problem.k), space, budget)
    except OverBudgetError as error:
        return f"over the memory budget: {error}"
    return ""


def _too_inexact(name: str, problem: Problem, constraints: Constraints) -> str:
    found = errors_of(name, problem.metric, problem.dtype)
    if found["reason"]:
        return f"wrong: {found['reason']}"
    if constraints.max_error is None:
        return ""
    # Exact distances of floats are proved, whatever fast arithmetic is off by.
    if problem.is_proved:
        found = dict.fromkeys(found, float(np.finfo(problem.space.output).eps))
    for kind in ("ordinary", "adversarial"):
        if not found[kind] <= constraints.max_error:
            return f"error {found[kind]:.2g} on {kind} data; at most {constraints.max_error:g} is allowed"
    return ""


def errors_of(name: str, metric: str, dtype: str) -> dict[str, Any]:
    """Return the error of a backend on ordinary and adversarial data, measured once for each version.

    Returns
    -------
    dict
        ``backend``, ``version``, ``metric``, ``dtype``; ``ordinary`` and ``adversarial``: max |d - d_ref| / max d_ref,
        infinite where a distance is not finite; ``reason``: why it is wrong on ordinary data, empty if it is not.
    """
    known = wisdom().error(name, metric, dtype)
    if known is None:
        known = {"backend": name, "version": backend_version(name), "metric": metric, "dtype": dtype}
        known |= measure_errors(name, metric, dtype)
        wisdom().add(errors=[known])
    return known


def measure_errors(name: str, metric: str, dtype: str) -> dict[str, Any]:
    """Return what `errors_of` does of one backend, measured now."""
    from knnbench.api import knn
    from knnbench.measure.reference import check_neighbors

    result: dict[str, Any] = {"reason": ""}
    for kind in ("ordinary", "adversarial"):
        queries, corpus, reference = _error_data(kind, metric, dtype)
        try:
            distances, indices = knn(queries, corpus, ERROR_K, metric, backend=name)
            verdict = check_neighbors(distances, indices, reference, same_order=False)
            error, reason = verdict.error, verdict.reason
        except Exception as failure:  # whatever a library raises, the backend cannot be chosen
            error, reason = None, f"{type(failure).__name__}: {failure}"
        result[kind] = float("inf") if error is None else error
        if kind == "ordinary":
            result["reason"] = reason
    return result


@functools.cache
def _error_data(kind: str, metric: str, dtype: str) -> tuple[Array, Array, Array]:
    """Return queries, a corpus and their distances: for bytes all values, or only the smallest and largest."""
    from knnbench.measure.reference import reference_distances

    rng = np.random.default_rng(0)
    rows: Array
    if dtype == "uint8":
        values = np.arange(1, 256) if kind == "ordinary" else np.array([1, 255])
        rows = rng.choice(values, (ERROR_QUERIES + ERROR_CORPUS, ERROR_FEATURES)).astype(np.uint8)
    else:
        rows = rng.standard_normal((ERROR_QUERIES + ERROR_CORPUS, ERROR_FEATURES))
        rows = (rows + (OFFSET if kind == "adversarial" else 0.0)).astype(dtype)
    queries, corpus = rows[:ERROR_QUERIES], rows[ERROR_QUERIES:]
    return queries, corpus, reference_distances(queries, corpus, metric)
