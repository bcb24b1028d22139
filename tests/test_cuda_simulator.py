"""The numba-cuda backend without a GPU, in numba's simulator: its arithmetic, its barriers and its edges.

What the simulator cannot show, such as the types that numba gives to expressions, `tests/test_gpu_compile.py` looks
at in machine code.
"""

import importlib.util

import pytest

from .conftest import REQUIRED
from .shares import run_cases


def test_the_cases_in_the_simulator():
    if importlib.util.find_spec("numba.cuda") is None:
        (pytest.fail if "cuda-simulator" in REQUIRED else pytest.skip)("this numba has no numba.cuda")
    # The simulator is chosen when numba is imported.
    run_cases("tests.simulated_cuda", NUMBA_ENABLE_CUDASIM="1", KNNBENCH_CASES="numba-cuda")
