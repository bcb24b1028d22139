"""numba's CUDA simulator, set up for the cases of `tests.gpu_cases`.

A plugin of pytest (``-p tests.simulated_cuda``) for a process that has NUMBA_ENABLE_CUDASIM=1. The simulator runs
each thread of a kernel as a thread of Python, so tiles are made small; its arrays do not present themselves as
device arrays; and where two threads reach a shared array at the same moment, it gives each its own.
"""

import sys

import numpy as np


def shared_array(self, shape, dtype):
    """Return the one array of the line that asks for it, whichever thread comes first."""
    from numba.np import numpy_support

    caller = sys._getframe(1)
    line = caller.f_code.co_filename, caller.f_lineno
    return self._allocations.setdefault(line, np.empty(shape, numpy_support.as_dtype(dtype)))


def pytest_configure(config):
    import numba
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    from knnbench.kernels import cuda_linear, cuda_tiles

    assert numba.config.ENABLE_CUDASIM
    cuda_tiles.THREADS, cuda_tiles.PER_THREAD, cuda_tiles.FEATURES, cuda_tiles.ROW_THREADS = 2, 2, 3, 4
    cuda_linear.THREADS, cuda_linear.PER_THREAD, cuda_linear.CLASSES, cuda_linear.FEATURE_BYTES = 2, 2, 2, 16
    FakeCUDAShared.array = shared_array
    FakeCUDAArray.__cuda_array_interface__ = property(lambda self: self._ary.__array_interface__)
    cuda_tiles.cuda.as_cuda_array = lambda array: array
