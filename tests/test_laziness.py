"""Importing knnbench loads numpy and nothing heavier; libraries of backends are loaded when they are asked for."""

import subprocess
import sys

import pytest

HEAVY = ("numba", "llvmlite", "torch", "cupy", "sklearn", "scipy", "faiss", "rich", "typer", "pooch", "pandas")
LOADED = f"print(' '.join(name for name in {HEAVY!r} if name in sys.modules))"


def loaded_after(statements):
    """Return which of the heavy libraries a new process has loaded after some statements."""
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{statements}\n{LOADED}"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_import_is_light():
    assert loaded_after("import knnbench") == set()


def test_this_test_can_fail():
    assert loaded_after("import knnbench\nimport scipy") == {"scipy"}


def test_a_planted_import_is_found():
    # As if a module of the package imported a heavy library at its top.
    plant = (
        "import knnbench.metrics as module\n"
        "source = open(module.__file__, encoding='utf-8').read() + '\\nimport scipy\\n'\n"
        "exec(compile(source, module.__file__, 'exec'), {'__name__': 'knnbench.metrics'})"
    )
    assert "scipy" in loaded_after(plant)


@pytest.mark.parametrize(
    "statements",
    [
        "import knnbench; knnbench.knn([[1.0]], [[2.0]], 1, backend='numpy')",
        "import knnbench; knnbench.pairwise([[1.0]], [[2.0]], 'cosine', backend='python')",
        "import knnbench; knnbench.prepare([[1.0]], backend='numpy')",
        "from knnbench.backends import registry; registry()",
        "import knnbench.errors, knnbench.metrics, knnbench.ordering, knnbench.blocking, knnbench.threads",
        "import knnbench.api, knnbench.interchange, knnbench.selection, knnbench.backends.base",
    ],
)
def test_what_needs_no_library_loads_none(statements):
    assert loaded_after(statements) == set()
