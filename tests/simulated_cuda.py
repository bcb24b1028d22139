"""numba's CUDA simulator, set up for the cases of `tests.gpu_cases`.

A plugin of pytest (``-p tests.simulated_cuda``) for a process that has NUMBA_ENABLE_CUDASIM=1. The simulator runs
each thread of a kernel as a thread of Python, so tiles are made small; it asks all of them without a pause whether they
wait, so here they run one after the other; its arrays do not present themselves as device arrays; it finds shared
arrays by the stack, and aligns none; and it runs no intrinsics, which have their forms in Python here.
"""

import random
import sys
import threading
import types

import numpy as np

MULTIPROCESSORS = 3

ORDER = random.Random(0)


def shared_array(self, shape, dtype, alignment=None):
    """Return the one array of the line that asks for it."""
    from numba.np import numpy_support

    caller = sys._getframe(1)
    line = caller.f_code.co_filename, caller.f_lineno
    return self._allocations.setdefault(line, np.empty(shape, numpy_support.as_dtype(dtype)))


def blocks_in_turn(simulated_thread):
    """Return how a block is run: each thread up to a barrier or its end, then another.

    In an order that changes from barrier to barrier, so that one that is missing shows whichever of two threads needs
    it.
    """

    class Thread(simulated_thread):
        def __init__(self, manager, block, thread, args):
            super().__init__(lambda: manager._f(*args), manager, block, thread, manager._debug)
            self.turn, self.rest = threading.Semaphore(0), threading.Semaphore(0)

        def run(self):
            super().run()
            self.rest.release()

        def go_on(self):
            self.syncthreads_blocked = False
            if self.ident:
                self.turn.release()
            else:
                self.start()
            self.rest.acquire()

        def syncthreads(self):
            self.syncthreads_blocked = True
            self.rest.release()
            self.turn.acquire()
            if self.abort:
                raise RuntimeError("another thread of the block has failed")

    def run(manager, block, *args):
        threads = [Thread(manager, block, thread, args) for thread in np.ndindex(*manager._block_dim)]
        failed = None
        while threads:
            ORDER.shuffle(threads)
            for thread in threads:
                thread.abort = failed is not None
                thread.go_on()
                failed = failed or thread.exception
            threads = [thread for thread in threads if thread.syncthreads_blocked]
        if failed:
            raise failed[0].with_traceback(failed[1])

    return run


def filled(value, count):
    return lambda: (value(0),) * count


def gathered(function, count):
    def gather(args):
        found = [function(number, *args) for number in range(count)]
        return tuple(element for part in found for element in (part if isinstance(part, tuple) else (part,)))

    return gather


def outer(function):
    def combine(sums, a, b):
        return tuple(function(sums[r * len(b) + c], a[r], b[c]) for r in range(len(a)) for c in range(len(b)))

    return combine


def folded(function):
    def fold(state, values, args):
        for number, value in enumerate(values):
            state = function(state, number, value, *args)
        return state

    return fold


def vectors_of(word):
    from numba.np import numpy_support

    dtype = numpy_support.as_dtype(word)

    def load(array, number):
        whole = np.asarray(getattr(array, "_ary", array))
        assert whole.flags.c_contiguous
        words = whole.reshape(-1).view(dtype)
        lanes = 16 // dtype.itemsize
        assert 0 <= number * lanes <= len(words) - lanes
        return tuple(words[number * lanes : (number + 1) * lanes].tolist())

    return load


def anew(value):
    return value


def inverse_root(value):
    return np.float32(1 / np.sqrt(np.float64(value)))


def four(word):
    return [int(word) >> shift & 255 for shift in (0, 8, 16, 24)]


def add_absolute_differences(total, a, b):
    return total + sum(abs(p - q) for p, q in zip(four(a), four(b), strict=True))


def add_products(total, a, b):
    return total + sum(p * q for p, q in zip(four(a), four(b), strict=True))


def larger_differences(total, a, b):
    return max(total, *(abs(p - q) for p, q in zip(four(a), four(b), strict=True)))


def largest_difference(total):
    return total


STAND_INS = (
    filled, gathered, outer, folded, vectors_of, anew, inverse_root, add_absolute_differences, add_products,
    larger_differences, largest_difference,
)  # fmt: skip


def pytest_configure(config):
    import numba
    import numba.cuda as cuda
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
    from numba.cuda.simulator.kernel import BlockManager, BlockThread, FakeCUDAKernel
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    assert numba.config.ENABLE_CUDASIM
    compiled = cuda.jit
    # It knows no options of compilers, and functions of the device are Python's.
    cuda.jit = lambda device=False, **options: (lambda function: function) if device else compiled
    device = types.SimpleNamespace(MULTIPROCESSOR_COUNT=MULTIPROCESSORS)
    cuda.get_current_device = lambda: device
    cuda.as_cuda_array = lambda array: array
    FakeCUDAShared.array = shared_array
    BlockManager.run = blocks_in_turn(BlockThread)
    FakeCUDAKernel._cache = types.SimpleNamespace()
    FakeCUDAArray.__cuda_array_interface__ = property(lambda self: self._ary.__array_interface__)

    from knnbench.kernels import cuda_intrinsics

    assert {function.__name__ for function in STAND_INS} == {*cuda_intrinsics.__all__} - {"VECTOR_BYTES"}
    for function in STAND_INS:
        setattr(cuda_intrinsics, function.__name__, function)

    from knnbench.kernels import cuda_launch, cuda_linear, cuda_tiles

    cuda_launch.ROW_THREADS = 4
    cuda_linear.THREADS, cuda_linear.PER_THREAD, cuda_linear.CLASSES, cuda_linear.FEATURE_BYTES = 2, 2, 2, 16
    cuda_tiles.LANES_ACROSS, cuda_tiles.LANES_DOWN, cuda_tiles.WARPS_ACROSS, cuda_tiles.WARPS_DOWN = 2, 1, 1, 2
    cuda_tiles.MERGING_THREADS, cuda_tiles.ROOM = 2, 8
