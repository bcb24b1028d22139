"""The registry, its status and the rules of its modules."""

import ast
import importlib
import importlib.metadata
import inspect
import pickle
import pkgutil
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import knnbench
from knnbench import BackendUnavailableError, UnknownBackendError, backends, knn
from knnbench.backends import ENTRY_POINTS, Registration, Status, backend_status, get_backend, registry
from knnbench.backends.base import Backend
from knnbench.backends.numpy import NumpyBackend
from knnbench.backends.python import PythonBackend
from knnbench.selection.auto import CANDIDATES

ROOT = Path(knnbench.__file__).parent
MODULE = importlib.import_module("knnbench.backends")  # `knnbench.backends` itself is the function
CACHED = ("registry", "_load", "backend_status")


def forget():
    """Empty the caches of the registry."""
    for name in CACHED:
        getattr(MODULE, name).cache_clear()


class GoodBackend(NumpyBackend):
    """A third party's."""


class WrongBackend(PythonBackend):
    """Answers, and wrongly."""

    def knn(self, queries, prepared, k, space, budget):
        values, indices = super().knn(queries, prepared, k, space, budget)
        return values, indices[::-1]


class NanBackend(PythonBackend):
    def knn(self, queries, prepared, k, space, budget):
        values, indices = super().knn(queries, prepared, k, space, budget)
        return values * np.float32("nan"), indices


class RaisingBackend(PythonBackend):
    def knn(self, queries, prepared, k, space, budget):
        raise RuntimeError("no driver\nfound.")


class SilentBackend(PythonBackend):
    def prepare(self, corpus, space):
        raise ValueError


class UnconstructibleBackend(PythonBackend):
    def __init__(self):
        raise OSError("libplanted.so: cannot open")


class AbstractBackend(Backend):
    """Lacks every method."""


class NotABackend:
    pass


@pytest.fixture
def add(monkeypatch):
    """Add entry points: name -> target. The caches are emptied before and after."""

    def plant(**targets):
        points = [importlib.metadata.EntryPoint(name, target, ENTRY_POINTS) for name, target in targets.items()]
        found = importlib.metadata.entry_points
        # Of other groups those that there are: scikit-learn's narwhals keeps what it finds.
        monkeypatch.setattr(
            importlib.metadata,
            "entry_points",
            lambda group: importlib.metadata.EntryPoints(points) if group == ENTRY_POINTS else found(group=group),
        )
        forget()

    forget()
    yield plant
    monkeypatch.undo()
    forget()


def here(cls):
    return f"{__name__}:{cls.__name__}"


def test_a_third_party_backend_works(add):
    add(theirs=here(GoodBackend))
    assert list(registry())[-1] == "theirs"
    status = backend_status("theirs")
    assert status.ok, status.reason
    assert status.device == "cpu"
    assert not status.peer
    assert status in backends()
    distances, indices = knn([[0.0]], [[3.0], [1.0]], 1, backend="theirs")
    assert (distances, indices) == ([[1.0]], [[1]])
    assert knn([[0.0]], [[3.0]], 1, backend="theirs").backend == "theirs"


def test_a_third_party_cannot_take_a_name(add):
    before = registry()["numpy"]
    add(numpy=here(WrongBackend))
    assert registry()["numpy"] == before
    assert backend_status("numpy").ok


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (here(WrongBackend), r"wrong answer to a 2 x 2 problem: .*expected"),
        (here(NanBackend), r"wrong answer to a 2 x 2 problem: .*nan"),
        (here(RaisingBackend), r"RuntimeError: no driver found$"),
        (here(SilentBackend), r"ValueError$"),
        (here(UnconstructibleBackend), r"OSError: libplanted.so: cannot open"),
        (here(AbstractBackend), r"TypeError: .*abstract"),
        (here(NotABackend), r"TypeError: .*NotABackend is not a knnbench.backends.base.Backend"),
        ("no_such_module_planted:Backend", r"ModuleNotFoundError: .*no_such_module_planted"),
        (f"{__name__}:Nothing", r"AttributeError: .*Nothing"),
        (__name__, r"\w+Error"),
    ],
)
def test_a_backend_that_does_not_work_says_why(add, target, reason):
    add(broken=target)
    status = backend_status("broken")
    assert not status.ok
    assert "\n" not in status.reason
    with pytest.raises(BackendUnavailableError, match="backend 'broken' is unavailable: "):
        get_backend("broken")
    with pytest.raises(BackendUnavailableError, match="broken"):
        knn([[0.0]], [[1.0]], 1, backend="broken")
    assert [other.ok for other in backends() if other.name == "broken"] == [False]
    assert backend_status("numpy").ok
    assert re.search(reason, status.reason), status.reason


def test_a_backend_whose_import_fails_in_its_library(add, tmp_path, monkeypatch):
    module = tmp_path / "planted_broken_backend.py"
    module.write_text("raise ImportError('libcudart.so.13: cannot open shared object')")
    monkeypatch.syspath_prepend(tmp_path)
    add(broken="planted_broken_backend:Backend")
    status = backend_status("broken")
    assert (status.ok, status.device, status.capabilities) == (False, "", None)
    assert status.reason == "ImportError: libcudart.so.13: cannot open shared object"


@pytest.mark.parametrize("name", list(registry()))
def test_the_device_is_known_before_a_backend_is_imported(name):
    line, status = registry()[name], backend_status(name)
    assert status.device in ("", line.device)
    assert ("NVIDIA GPU" in line.install) == (line.device == "cuda")


def test_what_installs_a_backend_is_in_the_error(add, monkeypatch):
    line = Registration("no_such_module_planted:Backend", "planted", "pip install planted")
    monkeypatch.setitem(MODULE._OWN, "planted", line)
    add()
    status = backend_status("planted")
    assert status.version == ""
    with pytest.raises(BackendUnavailableError, match=r"No module named .*\. To use it: pip install planted\.$"):
        get_backend("planted")


@pytest.mark.parametrize("name", ["nump", "", "NUMPY", None, 3, ["numpy"], "auto"])
def test_an_unknown_backend_lists_the_known(name):
    with pytest.raises(UnknownBackendError, match=r"expected 'auto' or one of: python, numpy, numba"):
        get_backend(name)


def test_names():
    names = list(registry())
    assert names[0] == "python"
    assert all(name == name.lower() and name.strip() == name and name for name in names)
    assert "auto" not in names
    assert [status.name for status in backends()] == names
    assert all(isinstance(status, Status) for status in backends())


def test_the_package_is_called_like_its_function_and_hides_no_module():
    import knnbench.backends.numpy as module

    assert module.NumpyBackend is NumpyBackend
    assert knnbench.backends is sys.modules["knnbench.backends"]
    assert knnbench.backends() == knnbench.backends.backends() == backends()
    assert inspect.signature(knnbench.backends) == inspect.signature(knnbench.backends.backends)
    assert knnbench.backends.__call__.__doc__ == knnbench.backends.backends.__doc__
    assert pickle.loads(pickle.dumps(knnbench.backends)) is knnbench.backends


def test_every_status_has_a_reason_or_works():
    for status in backends():
        assert status.ok == (not status.reason), status
        assert not status.ok or status.capabilities is not None


def test_auto_prefers_own_backends():
    lines = registry()
    for names in CANDIDATES.values():
        assert all(not lines[name].peer for name in names)


def test_targets_are_unique_and_exist():
    targets = [line.target for line in registry().values()]
    assert len(targets) == len(set(targets))
    for target in targets:
        module, _, name = target.partition(":")
        path = ROOT.joinpath(*module.split(".")[1:]).with_suffix(".py")
        assert path.is_file(), f"{target}: no {path.name}"
        classes = [node.name for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.ClassDef)]
        assert name in classes


# ---- modules


def module_files():
    """Return every module of the package by its name."""
    return {
        ".".join(("knnbench", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
        for path in sorted(ROOT.rglob("*.py"))
    }


def top_level(body):
    """Yield the names that statements at the top of a module define."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign):
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                yield from (part.id for part in ast.walk(target) if isinstance(part, ast.Name))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from top_level(node.body)
            yield from top_level(getattr(node, "orelse", []))


def listed(tree):
    """Return the names in ``__all__``, None if there is none."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets):
            return ast.literal_eval(node.value)
    return None


def in_order(name):
    """Constants, then classes, then the rest, as ruff sorts them."""
    return (0 if name.isupper() else 1 if name[:1].isupper() else 2), name


@pytest.mark.parametrize("name", module_files())
def test_all_is_sorted_and_complete(name):
    tree = ast.parse(module_files()[name].read_text("utf-8"))
    names = listed(tree)
    defined = set(top_level(tree.body))
    if names is None:
        own = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not own or name.endswith("__main__"), f"{name} has no __all__"
        return
    assert len(names) == len(set(names))
    assert set(names) <= defined, set(names) - defined
    assert names == sorted(names, key=in_order)


@pytest.mark.parametrize("name", module_files())
def test_every_module_says_what_it_is(name):
    assert ast.get_docstring(ast.parse(module_files()[name].read_text("utf-8")))


def test_every_folder_of_code_is_a_package():
    for path in module_files().values():
        assert (path.parent / "__init__.py").is_file(), path


def test_public_names_exist():
    for name in knnbench.__all__:
        assert getattr(knnbench, name) is not None
    public = {info.name for info in pkgutil.iter_modules(knnbench.__path__)}
    assert not public & set(knnbench.__all__) - {"backends"}, "a name is both a module and a thing in it"
