"""A stand-in for CuPy on numpy arrays, with those of CuPy's functions and restrictions that the backend meets.

As a plugin of pytest (``-p tests.fake_cupy``) it takes CuPy's place in that process. Its functions have CuPy's
parameters, as far as they are here (`tests/test_cuda_source.py` compares them with CuPy's own where that is
installed); its arrays do not mix with numpy's, and kernels run in `tests.cuda_emulator`.
"""

import ctypes
import operator
import sys
import time
import types
import typing
from pathlib import Path

import numpy as np

from tests import cuda_emulator

ARITHMETIC = ["add", "sub", "mul", "truediv", "floordiv", "pow", "and", "or"]
COMPARISONS = ["lt", "le", "gt", "ge", "eq", "ne"]
UNARY = ["neg", "abs", "invert"]


def unwrap(value):
    """Return what numpy computes with; an array of numpy itself is refused, as CuPy does."""
    if isinstance(value, ndarray):
        return value._host
    if isinstance(value, tuple):
        return tuple(map(unwrap, value))
    if isinstance(value, np.ndarray):
        raise TypeError(f"Unsupported type {type(value)}")
    return value


def wrap(value):
    """Return an array of results; a scalar of numpy becomes an array without dimensions, as in CuPy."""
    return tuple(map(wrap, value)) if isinstance(value, tuple) else ndarray(np.asarray(value))


class ndarray:
    """An array that pretends to live on a device."""

    __hash__ = None

    def __init__(self, host):
        self._host = host

    dtype = property(lambda self: self._host.dtype)
    shape = property(lambda self: self._host.shape)
    size = property(lambda self: self._host.size)
    T = property(lambda self: wrap(self._host.T))
    data = property(lambda self: MemoryPointer(self._host.ctypes.data))

    @property
    def __cuda_array_interface__(self):
        return self._host.__array_interface__

    def __array__(self, dtype=None, copy=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed.")

    def __len__(self):
        return len(self._host)

    def __bool__(self):
        return bool(self._host)

    def __int__(self):
        return int(self._host)

    def __float__(self):
        return float(self._host)

    def __getitem__(self, key):
        return wrap(self._host[unwrap(key)])

    def __setitem__(self, key, value):
        self._host[unwrap(key)] = unwrap(value)

    def any(self, axis=None, out=None, keepdims=False):
        return wrap(self._host.any(axis, keepdims=keepdims))

    def all(self, axis=None, out=None, keepdims=False):
        return wrap(self._host.all(axis, keepdims=keepdims))

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return wrap(self._host.sum(axis, dtype, keepdims=keepdims))

    def max(self, axis=None, out=None, keepdims=False):
        return wrap(self._host.max(axis, keepdims=keepdims))

    def min(self, axis=None, out=None, keepdims=False):
        return wrap(self._host.min(axis, keepdims=keepdims))

    def mean(self, axis=None, dtype=None, out=None, keepdims=False):
        return wrap(self._host.mean(axis, dtype, keepdims=keepdims))

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        return wrap(self._host.astype(dtype, order=order, copy=copy))

    def view(self, dtype=None):
        return wrap(self._host.view(dtype))

    def reshape(self, *shape, order="C", copy=None):
        return wrap(self._host.reshape(*shape, order=order))

    def get(self, stream=None, order="C", out=None, blocking=True):
        return np.array(self._host, order=order)


def _binary(name, swapped, in_place):
    compute = getattr(operator, f"__{name}__")

    def method(self, other):
        other = unwrap(other)
        if in_place:
            self._host[...] = compute(self._host, other)
            return self
        return wrap(compute(other, self._host) if swapped else compute(self._host, other))

    return method


def _unary(name):
    compute = getattr(operator, f"__{name}__")
    return lambda self: wrap(compute(self._host))


for _name in (*ARITHMETIC, *COMPARISONS):
    setattr(ndarray, f"__{_name}__", _binary(_name, swapped=False, in_place=False))
for _name in ARITHMETIC:
    setattr(ndarray, f"__r{_name}__", _binary(_name, swapped=True, in_place=False))
    setattr(ndarray, f"__i{_name}__", _binary(_name, swapped=False, in_place=True))
for _name in UNARY:
    setattr(ndarray, f"__{_name}__", _unary(_name))


def _ufunc(name, n_in):
    compute = getattr(np, name)

    def call(*args, out=None, dtype=None):
        assert len(args) == n_in, f"{name} is given {len(args)} arrays"
        assert any(isinstance(arg, ndarray) for arg in args), f"{name} is given no array"
        if out is None:
            return wrap(compute(*map(unwrap, args), dtype=dtype))
        compute(*map(unwrap, args), out=unwrap(out), dtype=dtype)
        return out

    return call


UFUNCS = {
    name: _ufunc(name, n_in)
    for name, n_in in {
        "abs": 1,
        "add": 2,
        "exp": 1,
        "frexp": 1,
        "isfinite": 1,
        "ldexp": 2,
        "log": 1,
        "maximum": 2,
        "multiply": 2,
        "sqrt": 1,
        "subtract": 2,
    }.items()
}


def empty(shape, dtype=float, order="C"):
    # What an element nobody wrote to would show: a NaN, or a large number.
    size = np.dtype(dtype).itemsize
    host = np.full((*np.broadcast_to(shape, np.size(shape)), size), 0xFF, np.uint8).view(dtype)[..., 0]
    return wrap(np.array(host, order=order))


def empty_like(prototype, dtype=None, order="K", subok=None, shape=None):
    return empty(prototype.shape, dtype or prototype.dtype)


def zeros(shape, dtype=float, order="C"):
    return wrap(np.zeros(shape, dtype, order))


def full(shape, fill_value, dtype=None, order="C"):
    return wrap(np.full(shape, fill_value, dtype, order))


def arange(start, stop=None, step=1, dtype=None):
    return wrap(np.arange(start, stop, step, dtype) if stop is not None else np.arange(start, dtype=dtype))


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    host = a._host if isinstance(a, ndarray) else a
    if isinstance(host, np.ndarray) and not host.dtype.isnative:
        raise ValueError(f"Unsupported dtype {host.dtype}")
    if isinstance(a, ndarray):
        return wrap(np.asarray(host, dtype, order=order))
    return wrap(np.array(host, dtype, order=order or "C"))


def ascontiguousarray(a, dtype=None):
    return wrap(np.ascontiguousarray(unwrap(a), dtype))


def argsort(a, axis=-1, kind=None):
    assert kind in (None, "stable"), f"kind {kind!r} is not supported"
    return wrap(np.argsort(unwrap(a), axis, kind="stable"))


def partition(a, kth, axis=-1):
    return wrap(np.partition(unwrap(a), kth, axis))


def take_along_axis(a, indices, axis):
    return wrap(np.take_along_axis(unwrap(a), unwrap(indices), axis))


def nonzero(a):
    # The columns of one array, as in CuPy: not contiguous.
    places = np.argwhere(unwrap(a))
    return tuple(wrap(places[:, axis]) for axis in range(places.shape[1]))


def cumsum(a, axis=None, dtype=None, out=None):
    return wrap(np.cumsum(unwrap(a), axis, dtype))


def concatenate(tup, axis=0, out=None, *, dtype=None, casting="same_kind"):
    return wrap(np.concatenate([unwrap(a) for a in tup], axis))


def repeat(a, repeats, axis=None):
    return wrap(np.repeat(unwrap(a), repeats, axis))


def broadcast_to(array, shape):
    return wrap(np.broadcast_to(unwrap(array), shape))


def median(a, axis=None, out=None, overwrite_input=False, keepdims=False):
    return wrap(np.median(unwrap(a), axis, keepdims=keepdims))


def clip(a, a_min, a_max, out=None):
    return wrap(np.clip(unwrap(a), a_min, a_max))


def argmin(a, axis=None, dtype=None, out=None, keepdims=False):
    return wrap(np.argmin(unwrap(a), axis, keepdims=keepdims))


def matmul(*args, axes=None, axis=None, keepdims=False, casting="same_kind", dtype=None, signature=None, order="K",
           out=None):  # fmt: skip
    assert all(a.dtype.kind == "f" for a in args), "matmul of integers is no matrix product of cuBLAS"
    return wrap(np.matmul(*map(unwrap, args)))


def einsum(*operands, **kwargs):
    assert kwargs.keys() <= {"dtype", "optimize"}, f"einsum does not take {kwargs}"
    return wrap(np.einsum(*(unwrap(a) for a in operands), **kwargs))


class RawModule:
    """Kernels from source, run in the emulator."""

    def __init__(self, code=None, *, path=None, options=(), backend="nvrtc"):
        self._kernels = cuda_emulator.compiled(code if path is None else Path(path).read_text())

    def get_function(self, name):
        return RawKernel(self._kernels, name)


class RawKernel:
    # Of the function on the device, which all objects made of it share.
    _allowed: typing.ClassVar = {}

    def __init__(self, kernels, name):
        self._kernels, self._name = kernels, name

    @property
    def max_dynamic_shared_size_bytes(self):
        return self._allowed.get((self._kernels, self._name), 48 << 10)

    @max_dynamic_shared_size_bytes.setter
    def max_dynamic_shared_size_bytes(self, n_bytes):
        self._allowed[self._kernels, self._name] = n_bytes

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes, f"{self._name} is not allowed {shared_mem} bytes"
        assert shared_mem <= Device.attributes["MaxSharedMemoryPerBlockOptin"]
        self._kernels.launch(self._name, grid, block, tuple(map(unwrap, args)), shared_mem)


class MemoryPointer:
    def __init__(self, address):
        self.ptr = address

    def copy_from_host_async(self, mem, size, stream=None):
        ctypes.memmove(self.ptr, mem, size)

    def copy_to_host_async(self, mem, size, stream=None):
        ctypes.memmove(mem, self.ptr, size)


class OutOfMemoryError(MemoryError):
    pass


class Stream:
    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        self.ptr = int(non_blocking)

    def synchronize(self):
        pass

    def record(self, event=None):
        event = Event() if event is None else event
        event.record(self)
        return event

    def wait_event(self, event):
        event.synchronize()


class Device:
    id = 0
    compute_capability = "90"
    attributes: typing.ClassVar = {"MultiProcessorCount": 3, "MaxSharedMemoryPerBlockOptin": 227 << 10}

    def __init__(self, device=None):
        assert device in (None, 0), f"there is no device {device}"


class Event:
    def record(self, stream=None):
        self.time_s = time.perf_counter()

    def synchronize(self):
        assert self.time_s


def get_elapsed_time(start_event, end_event):
    return (end_event.time_s - start_event.time_s) * 1e3


class MemoryPool:
    def free_all_blocks(self, stream=None):
        self.bytes = 1000

    def total_bytes(self):
        self.bytes += 512
        return self.bytes


POOL = MemoryPool()


def fake_nvrtc():
    """Return a compiler whose machine code is the source."""
    programs = []
    module = types.ModuleType("cupy_backends.cuda.libs.nvrtc")
    module.getVersion = lambda: (0, 0)
    module.createProgram = lambda src, name, headers, include_names: programs.append(src) or len(programs) - 1
    module.compileProgram = lambda prog, options: None
    module.getCUBIN = lambda prog: programs[prog].encode()
    module.destroyProgram = lambda prog: None
    return module


FUNCTIONS = {
    function.__name__: function
    for function in (empty, empty_like, zeros, full, arange, asarray, ascontiguousarray, argsort, partition,
                     take_along_axis, nonzero, cumsum, concatenate, repeat, broadcast_to, median, clip, argmin, matmul,
                     einsum)
}  # fmt: skip


def install():
    """Take CuPy's place in this process."""
    module = types.ModuleType("cupy")
    vars(module).update(FUNCTIONS, **UFUNCS, ndarray=ndarray, RawModule=RawModule)
    module.cuda = types.SimpleNamespace(
        get_current_stream=Stream,
        Stream=Stream,
        Event=Event,
        get_elapsed_time=get_elapsed_time,
        alloc_pinned_memory=bytearray,
        Device=Device,
        memory=types.SimpleNamespace(OutOfMemoryError=OutOfMemoryError),
        runtime=types.SimpleNamespace(pointerGetAttributes=lambda ptr: types.SimpleNamespace(type=0), memoryTypeHost=1),
    )
    module.get_default_memory_pool = lambda: POOL
    ndarray.__module__ = "cupy"
    sys.modules["cupy"] = module
    nvrtc = fake_nvrtc()
    for name in ("cupy_backends", "cupy_backends.cuda", "cupy_backends.cuda.libs"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["cupy_backends.cuda.libs"].nvrtc = sys.modules[nvrtc.__name__] = nvrtc


def pytest_configure(config):
    install()
