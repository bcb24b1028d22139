"""The numba-cuda backend without a GPU, in numba's simulator: its arithmetic, its barriers and its edges.

What the simulator cannot show, such as the types that numba gives to expressions, `tests/test_gpu_compile.py` looks
at in machine code.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import REQUIRED

CASES = Path(__file__).with_name("gpu_cases.py")


def test_the_cases_in_the_simulator():
    if importlib.util.find_spec("numba.cuda") is None:
        (pytest.fail if "cuda-simulator" in REQUIRED else pytest.skip)("this numba has no numba.cuda")
    # The simulator is chosen when numba is imported.
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1", "KNNBENCH_CASES": "numba-cuda"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "tests.simulated_cuda", str(CASES)]
    done = subprocess.run(command, env=environment, cwd=CASES.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
