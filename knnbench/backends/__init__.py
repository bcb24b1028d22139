"""The registry of backends: which exist, what each needs, and whether it works here.

A backend is imported when it is first asked for. Third parties add theirs through the entry-point group
``knnbench.backends``: the name of the backend, and the `knnbench.backends.base.Backend` class.
"""

import functools
import importlib
import importlib.metadata
import sys
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np

from knnbench.blocking import DEFAULT_BUDGET
from knnbench.errors import BackendUnavailableError, UnknownBackendError
from knnbench.metrics import METRICS, Space

from .base import Backend, Capabilities

__all__ = [
    "ENTRY_POINTS",
    "Registration",
    "Status",
    "backend_status",
    "backends",
    "backends_on",
    "get_backend",
    "registry",
    "version_of",
]

ENTRY_POINTS = "knnbench.backends"


@dataclass(frozen=True, slots=True)
class Registration:
    """One line of the registry.

    Attributes
    ----------
    target : str
        ``module:class``.
    distributions : tuple of str
        The packages it may come from; the version shown is that of the first installed.
    install : str
        What makes it work; empty where knnbench itself does.
    peer : bool
        Whether it is another project's search, measured as it is, and never chosen by ``backend="auto"``.
    device : {"cpu", "cuda"}
        That of its `Capabilities`, known before it is imported; a third party's is taken for the CPU until then.
    """

    target: str
    distributions: tuple[str, ...]
    install: str = ""
    peer: bool = False
    device: Literal["cpu", "cuda"] = "cpu"


_TORCH = "pip install 'knnbench[torch]'"
_CUDA = "pip install 'knnbench[cuda13]' (or cuda12), with an NVIDIA GPU and its driver"
_TORCH_CUDA = "pip install torch (a CUDA build), with an NVIDIA GPU and its driver"

_OWN: dict[str, Registration] = {
    "python": Registration("knnbench.backends.python:PythonBackend", ("knnbench",)),
    "numpy": Registration("knnbench.backends.numpy:NumpyBackend", ("numpy",)),
    "numba": Registration("knnbench.backends.numba:NumbaBackend", ("numba",)),
    "numba-cuda": Registration("knnbench.backends.numba_cuda:NumbaCudaBackend", ("numba-cuda",), _CUDA, device="cuda"),
    "cupy": Registration(
        "knnbench.backends.cupy:CupyBackend", ("cupy-cuda13x", "cupy-cuda12x", "cupy"), _CUDA, device="cuda"
    ),
    "torch": Registration("knnbench.backends.torch:TorchBackend", ("torch",), _TORCH),
    "torch-cuda": Registration("knnbench.backends.torch:TorchCudaBackend", ("torch",), _TORCH_CUDA, device="cuda"),
    "notebook": Registration("knnbench.backends.notebook:NotebookBackend", ("numpy",), peer=True),
    "torch-cdist": Registration("knnbench.backends.torch_cdist:TorchCdistBackend", ("torch",), _TORCH, peer=True),
    "torch-cdist-cuda": Registration(
        "knnbench.backends.torch_cdist:TorchCdistCudaBackend", ("torch",), _TORCH_CUDA, peer=True, device="cuda"
    ),
    "torch-mm": Registration("knnbench.backends.torch_mm:TorchMmBackend", ("torch",), _TORCH, peer=True),
    "torch-mm-cuda": Registration(
        "knnbench.backends.torch_mm:TorchMmCudaBackend", ("torch",), _TORCH_CUDA, peer=True, device="cuda"
    ),
    "scipy": Registration("knnbench.backends.scipy:ScipyBackend", ("scipy",), peer=True),
    "sklearn": Registration("knnbench.backends.sklearn:SklearnBackend", ("scikit-learn",), peer=True),
    "faiss": Registration(
        "knnbench.backends.faiss:FaissBackend", ("faiss-cpu", "faiss-gpu"), "pip install 'knnbench[peers]'", peer=True
    ),
}


@dataclass(frozen=True, slots=True)
class Status:
    """Whether a backend works here, from having computed with it.

    Attributes
    ----------
    name : str
    ok : bool
    reason : str
        Why not; empty if it works.
    device : str
        ``"cpu"``, ``"cuda"``, or empty where the backend could not be imported.
    version : str
        Of its library; empty where that is not installed.
    peer : bool
    install : str
        What would make it work; empty where nothing is needed.
    capabilities : Capabilities or None
        None where the backend could not be imported.
    """

    name: str
    ok: bool
    reason: str
    device: str
    version: str
    peer: bool
    install: str
    capabilities: Capabilities | None


@functools.cache
def registry() -> dict[str, Registration]:
    """Return every registered backend by name: own, peers, then third parties'.

    A third party's backend cannot take a name that is taken.
    """
    known = dict(_OWN)
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        distribution = point.dist.name if point.dist else point.module
        known.setdefault(point.name, Registration(point.value, (distribution,)))
    return known


@functools.cache
def _load(name: str) -> Backend:
    """Import and construct a backend; whatever its library raises passes through."""
    module, _, attribute = registry()[name].target.partition(":")
    backend = getattr(importlib.import_module(module), attribute)()
    if not isinstance(backend, Backend):
        raise TypeError(f"{module}:{attribute} is not a knnbench.backends.base.Backend")
    return backend


def _require_known(name: str) -> Registration:
    try:
        return registry()[name]
    except (KeyError, TypeError):
        raise UnknownBackendError(
            f"backend {name!r} is unknown; expected 'auto' or one of: {', '.join(registry())}."
        ) from None


def get_backend(name: str) -> Backend:
    """Return the backend of that name, ready to compute.

    Raises
    ------
    UnknownBackendError
        If none is registered under `name`.
    BackendUnavailableError
        If it is, but does not work here; the text says why and how to install it.

    Examples
    --------
    >>> get_backend("numpy").capabilities.device
    'cpu'
    """
    registration = _require_known(name)
    status = backend_status(name)
    if not status.ok:
        remedy = f" To use it: {registration.install}." if registration.install else ""
        raise BackendUnavailableError(f"backend {name!r} is unavailable: {status.reason}.{remedy}")
    return _load(name)


@functools.cache
def backend_status(name: str) -> Status:
    """Compute a 2 x 2 answer with a backend and return its `Status`; computed once a process."""
    registration = _require_known(name)
    capabilities = None
    try:
        capabilities = _load(name).capabilities
        reason = _probe(_load(name))
    except Exception as error:  # any failure of a library is a reason, not a crash of the listing
        reason = _one_line(error)
    return Status(
        name=name,
        ok=not reason,
        reason=reason,
        device=capabilities.device if capabilities else "",
        version=version_of(name),
        peer=registration.peer,
        install=registration.install,
        capabilities=capabilities,
    )


def backends() -> list[Status]:
    """Return the status of every registered backend, in the order of the registry.

    Examples
    --------
    >>> [status.name for status in backends() if status.ok][:3]
    ['python', 'numpy', 'numba']
    """
    return [backend_status(name) for name in registry()]


def backends_on(device: str) -> list[str]:
    """Return the names of the backends of a device, with those that do not work here.

    Parameters
    ----------
    device : {"cpu", "cuda"}

    Raises
    ------
    BackendUnavailableError
        If none of them works; the text says why for each.
    """
    found = {name: backend_status(name) for name in registry()}
    # One that cannot be imported tells no device.
    names = [name for name, status in found.items() if (status.device or registry()[name].device) == device]
    if not any(found[name].ok for name in names):
        reasons = "; ".join(f"{name}: {found[name].reason}" for name in names)
        raise BackendUnavailableError(
            f"no backend computes on device {device!r} here ({reasons}). `knnbench backends` says how to get each."
        )
    return names


def _probe(backend: Backend) -> str:
    """Return why a backend's answer to a 2 x 2 problem is not right, empty if it is."""
    capabilities = backend.capabilities
    dtype = np.dtype(next(name for name in ("float32", "float64", "uint8") if name in capabilities.dtypes))
    metric = METRICS[min(capabilities.metrics & {"cityblock", "euclidean"} or capabilities.metrics)]
    rows = np.array([[3, 4], [3, 5]], dtype)
    space = Space(metric, dtype, 2)
    native = backend.to_native(rows, dtype)
    values, indices = backend.knn(native, backend.prepare(native, space), 1, space, DEFAULT_BUDGET)
    backend.synchronize()
    found: Any = backend.to_numpy(backend.finish(values, space)).tolist(), backend.to_numpy(indices).tolist()
    expected = [[0], [0]], [[0], [1]]
    return "" if found == expected else f"wrong answer to a 2 x 2 problem: {found}, expected {expected}"


def version_of(name: str) -> str:
    """Return the version of a registered backend's library, empty if it is not installed."""
    for distribution in registry()[name].distributions:
        try:
            return importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
    return ""


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".: ")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


class _Package(ModuleType):
    """This package, which can be called: ``knnbench.backends`` is the package and the function of its name in one."""

    def __call__(self) -> list[Status]:
        return backends()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle by name: of modules, picklers know only those that are nothing more."""
        return importlib.import_module, (self.__name__,)


_Package.__call__.__doc__ = backends.__doc__
# A function in the package's place would hide its modules from ``import knnbench.backends.cupy as name``.
sys.modules[__name__].__class__ = _Package
