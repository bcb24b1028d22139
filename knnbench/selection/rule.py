"""The rule behind ``backend="auto"``: simple, stated, and the same on every machine.

Own backends only, so that the answers keep the rules for ties, dtypes and accuracy. The first of
`PREFERENCE` that works and has what is asked is taken: on the host numba, whose kernels hold no distances;
then numpy. Arrays on a CUDA device stay there. Data on the host stay on the host: whether a copy to a
device pays depends on the machine and is for measurement to say.
"""

from knnbench.backends import backend_status
from knnbench.backends.base import Capabilities
from knnbench.errors import BackendUnavailableError, UnsupportedError
from knnbench.metrics import Space

__all__ = ["choose", "lacks"]

PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("numba", "numpy"),
    "cuda": ("cupy", "torch-cuda", "numba-cuda"),
}


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
    if accuracy == "exact" and not (space.is_integer and capabilities.exact_integers and capabilities.total_order):
        return f"lacks accuracy='exact' for {space.dtype.name} (own backends have it for uint8)"
    return ""


def choose(space: Space, accuracy: str, device: str) -> tuple[str, dict[str, str]]:
    """Choose a backend.

    Parameters
    ----------
    space : Space
        What is to be computed.
    accuracy : {"fast", "exact"}
    device : {"cpu", "cuda"}
        Where the data are.

    Returns
    -------
    name : str
    passed_over : dict of str to str
        The backends before it in the preference, and why each was passed over.

    Raises
    ------
    UnsupportedError, BackendUnavailableError
        If none of those that work has what is asked for, or none works; the text gives every reason.
    """
    passed_over: dict[str, str] = {}
    works = False
    for name in PREFERENCE[device]:
        status = backend_status(name)
        reason = status.reason
        if status.capabilities is not None and status.ok:
            works, reason = True, lacks(status.capabilities, space, accuracy)
        if not reason:
            return name, passed_over
        passed_over[name] = reason
    reasons = "; ".join(f"{name}: {reason}" for name, reason in passed_over.items())
    kind = UnsupportedError if works else BackendUnavailableError
    raise kind(f"backend 'auto' found none for data on {device!r}: {reasons}.")
