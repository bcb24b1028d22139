"""Processes of tests that work side by side: compilers and simulators take minutes, and each of them one CPU.

As a plugin of pytest (``-p tests.shares``) it leaves a process its share of the tests: every n-th of those chosen.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from knnbench.threads import available_cpus

CASES = Path(__file__).with_name("gpu_cases.py")
ROOT = CASES.parents[1]

SHARE_VARIABLE = "KNNBENCH_TEST_SHARE"

# Each loads numba, and some torch.
MOST_PROCESSES = 4


def outputs(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> list[str]:
    """Return what commands print that run at the same time; one that fails is an AssertionError with its last lines."""

    def output(command: Sequence[str], environment: dict[str, str]) -> str:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    with ThreadPoolExecutor(len(commands)) as pool:
        return list(pool.map(output, commands, environments))


def run_cases(plugin: str, chosen: str = "", **environment: str) -> None:
    """Run the cases of `tests.gpu_cases` with a plugin that pretends to be a device, in a process for each CPU."""
    count = min(available_cpus(), MOST_PROCESSES)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", plugin, "-p", __name__, str(CASES)]
    shares = [f"{number}/{count}" for number in range(count)]
    environments = [{**os.environ, **environment, SHARE_VARIABLE: share} for share in shares]
    outputs([[*command, "-k", chosen]] * count, environments)


@pytest.hookimpl(trylast=True)  # what -k leaves is divided
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave this process its share of the tests."""
    number, count = map(int, os.environ[SHARE_VARIABLE].split("/"))
    items[:] = items[number::count]
