"""The numba-cuda backend without a GPU, in numba's simulator: its arithmetic, its barriers and its edges.

What the simulator cannot show, such as the types that numba gives to expressions, `tests/test_gpu_compile.py` looks
at in machine code.
"""

import importlib.util
import os
import subprocess
import sys

import pytest

from .conftest import REQUIRED
from .shares import ROOT, run_cases

# The simulator is chosen when numba is imported.
SIMULATOR = {"NUMBA_ENABLE_CUDASIM": "1", "KNNBENCH_CASES": "numba-cuda"}


@pytest.fixture(autouse=True)
def simulator():
    if importlib.util.find_spec("numba.cuda") is None:
        (pytest.fail if "cuda-simulator" in REQUIRED else pytest.skip)("this numba has no numba.cuda")


def test_the_cases_in_the_simulator():
    run_cases("tests.simulated_cuda", **SIMULATOR)


BARRIERS = """
import numpy as np
from tests import simulated_cuda

simulated_cuda.pytest_configure(None)
from numba import cuda, int64

@cuda.jit()
def kernel(others, has_barrier, found):
    shared, thread = cuda.shared.array(4, int64), cuda.threadIdx.x
    for turn in range(len(found)):
        shared[thread] = 10 * turn + thread
        if has_barrier:
            cuda.syncthreads()
        found[turn, thread] = shared[others[thread]]
        cuda.syncthreads()
    if others[thread] < 0:
        raise IndexError(thread)

def is_right(others, has_barrier):
    found = np.zeros((8, 4), np.int64)
    kernel[1, 4](np.array(others), has_barrier, found)
    return (found == 10 * np.arange(8)[:, None] + others).all()

# Each thread reads of the one after it, or of the one before it.
for others in ([1, 2, 3, 3], [0, 0, 1, 2]):
    assert is_right(others, True) and not is_right(others, False)
try:
    is_right([1, 2, -1, 3], True)
except IndexError as error:
    print(error)
"""


def test_a_missing_barrier_and_an_error_of_a_thread_show():
    command = [sys.executable, "-c", BARRIERS]
    done = subprocess.run(command, env=os.environ | SIMULATOR, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tid=[2, 0, 0] ctaid=[0, 0, 0]: 2")
