"""Fixtures that every test shares.

``KNNBENCH_REQUIRE=numpy,numba`` names the backends that this run promises: for these, unavailable is a failure
and not a skip. ``gpu-check``, ``cuda-simulator``, ``chromium`` and ``dask`` are promises that single test files look
for.
"""

import os
import zlib
from typing import Any

import hypothesis
import numpy as np
import pytest

from knnbench.backends import backend_status, registry

REQUIRE_VARIABLE = "KNNBENCH_REQUIRE"
OTHER_PROMISES = frozenset({"gpu-check", "cuda-simulator", "chromium", "dask"})

# The same examples in every run and no clock: a slow machine must not fail a test of arithmetic.
hypothesis.settings.register_profile(
    "knnbench",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=60,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture, hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("knnbench")


def required_backends(text: str) -> frozenset[str]:
    """Return the names in a value of $KNNBENCH_REQUIRE; one that nothing answers to is an error."""
    names = frozenset(name.strip() for name in text.split(",") if name.strip())
    unknown = names - OTHER_PROMISES - registry().keys()
    if unknown:
        raise pytest.UsageError(
            f"${REQUIRE_VARIABLE} names unknown backends: {', '.join(sorted(unknown))}; expected some of: "
            f"{', '.join((*registry(), *sorted(OTHER_PROMISES)))}."
        )
    return names


REQUIRED = required_backends(os.environ.get(REQUIRE_VARIABLE, ""))

# Of pytest-benchmark: asking for any of these asks for times, also where --benchmark-only is forgotten. A comparison
# that timed nothing would pass.
ASK_FOR_TIMES = ("only", "enable", "save", "autosave", "json", "compare", "compare_fail")


def pytest_configure(config: pytest.Config) -> None:
    """Let benchmarks run once and untimed, as tests of their answers, and threads wait, unless times are asked for."""
    # pytest-benchmark reads the option in a hook that runs last.
    if not any(config.getoption(f"benchmark_{name}") for name in ASK_FOR_TIMES):
        config.option.benchmark_disable = True
        # Otherwise threads that wait for each other take a CPU each, and a search of few rows by scikit-learn, torch or
        # faiss took 50 ms where others have the second one. Read when their OpenMP is loaded, here and in processes of
        # tests.
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def as_parameter(name: str) -> Any:
    """Return the parameter of a backend, marked if it needs a GPU."""
    return pytest.param(name, id=name, marks=[pytest.mark.gpu] if registry()[name].device == "cuda" else [])


def available(name: str, required: frozenset[str] = REQUIRED) -> str:
    """Return the name of a backend that works here; skip the test if it does not, fail it if that was promised."""
    status = backend_status(name)
    if not status.ok:
        if name in required:
            pytest.fail(f"backend {name!r} is in ${REQUIRE_VARIABLE} and unavailable: {status.reason}", pytrace=False)
        pytest.skip(f"backend {name!r} is unavailable: {status.reason}")
    return name


@pytest.fixture(params=[as_parameter(name) for name in registry()])
def backend(request: pytest.FixtureRequest) -> str:
    """Name of each backend, own and peers."""
    return available(request.param)


@pytest.fixture(params=[as_parameter(name) for name, line in registry().items() if not line.peer])
def own_backend(request: pytest.FixtureRequest) -> str:
    """Name of each own backend."""
    return available(request.param)


@pytest.fixture(params=[as_parameter(name) for name, line in registry().items() if not line.peer and name != "python"])
def compared_backend(request: pytest.FixtureRequest) -> str:
    """Name of each own backend but the reference, for what takes that one long."""
    return available(request.param)


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    """Generator seeded by the name of the test, without its backend, so that all backends see the same data."""
    name = getattr(request.node, "originalname", None) or request.node.name
    return np.random.default_rng(zlib.crc32(name.encode()))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep the variables of the caller's shell, and what was measured on this machine, out of what is tested."""
    monkeypatch.delenv("KNNBENCH_MEMORY_BUDGET", raising=False)
    monkeypatch.setenv("KNNBENCH_WISDOM", str(tmp_path_factory.getbasetemp() / "wisdom"))
