"""numba's CUDA simulator, set up for the cases of `tests.gpu_cases`.

A plugin of pytest (``-p tests.simulated_cuda``) for a process that has NUMBA_ENABLE_CUDASIM=1. The simulator runs
each thread of a kernel as a thread of Python, so tiles are made small; and its arrays do not present themselves as
device arrays.
"""


def pytest_configure(config):
    import numba
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    from knnbench.kernels import cuda_tiles

    assert numba.config.ENABLE_CUDASIM
    cuda_tiles.THREADS, cuda_tiles.PER_THREAD, cuda_tiles.FEATURES, cuda_tiles.ROW_THREADS = 2, 2, 3, 4
    FakeCUDAArray.__cuda_array_interface__ = property(lambda self: self._ary.__array_interface__)
    cuda_tiles.cuda.as_cuda_array = lambda array: array
