"""Data sets: what is returned, what is refused, and what a broken file or a broken download leaves behind."""

import dataclasses
import gzip
import hashlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from knnbench import datasets
from knnbench.datasets import (
    ADVERSARIAL_KINDS,
    DATASETS,
    MNIST_MIRRORS,
    SYNTHETIC_KINDS,
    Dataset,
    best_available,
    fetch_mnist,
    load,
    status,
    synthetic_dtypes,
)
from knnbench.errors import DatasetError, InvalidInputError

PARTS = ("X_train", "y_train", "X_test", "y_test")
KIND_AND_DTYPE = [(kind, dtype) for kind in SYNTHETIC_KINDS for dtype in synthetic_dtypes(kind)]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directory that the cache of MNIST will be, in a world without any other copy and without a terminal."""
    for variable in ("FORCE_COLOR", "TTY_COMPATIBLE"):  # with these, rich takes anything for a terminal
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("KNNBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("KNNBENCH_DATA", raising=False)
    return tmp_path / "cache" / "mnist"


def idx(values: np.ndarray) -> bytes:
    """Write an array in the format of the files of MNIST."""
    return bytes((0, 0, 8, values.ndim)) + np.array(values.shape, ">u4").tobytes() + values.tobytes()


@dataclasses.dataclass(frozen=True)
class Tiny:
    """A stand-in for MNIST: the arrays, and the bytes of each file, not compressed."""

    arrays: dict[str, np.ndarray]
    content: dict[str, bytes]

    def name(self, part: str) -> str:
        return datasets._MNIST_FILES[part].name

    def write(self, directory: Path, *, compress: bool = True) -> Path:
        directory.mkdir(parents=True, exist_ok=True)
        for part, content in self.content.items():
            if compress:
                (directory / f"{self.name(part)}.gz").write_bytes(gzip.compress(content))
            else:
                (directory / self.name(part)).write_bytes(content)
        return directory

    def pages(self) -> dict[str, bytes]:
        return {f"/{self.name(part)}.gz": gzip.compress(content) for part, content in self.content.items()}

    def assert_same(self, data: Dataset) -> None:
        for part, expected in self.arrays.items():
            np.testing.assert_array_equal(getattr(data, part), expected.reshape(len(expected), -1).squeeze())


@pytest.fixture
def tiny(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Tiny:
    """Four small files under the names of MNIST, with the table of shapes and checksums to match."""
    rng = np.random.default_rng(0)
    arrays, content, table = {}, {}, {}
    for part, file in datasets._MNIST_FILES.items():
        shape = (20 if part.endswith("train") else 7, 4, 4)[: len(file.shape)]
        arrays[part] = rng.integers(0, 256 if part.startswith("X") else 10, shape).astype(np.uint8)
        content[part] = idx(arrays[part])
        table[part] = file._replace(shape=shape, sha256=hashlib.sha256(content[part]).hexdigest())
    monkeypatch.setattr(datasets, "_MNIST_FILES", table)
    return Tiny(arrays, content)


# --- the interface ---------------------------------------------------------------------------------------


def test_all_is_sorted_and_complete() -> None:
    assert datasets.__all__ == sorted(datasets.__all__, key=lambda name: (not name.isupper(), name))
    assert all(hasattr(datasets, name) for name in datasets.__all__)


def test_import_loads_nothing_heavy() -> None:
    code = (
        "import sys, knnbench.datasets as d\n"
        "heavy = {'pooch', 'platformdirs', 'rich', 'sklearn', 'requests', 'scipy', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "d.load('digits')\n"
        "assert 'sklearn' in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["", "MNIST", "iris", None, 3, ["digits"]])
def test_unknown_name_is_refused(name: object) -> None:
    with pytest.raises(InvalidInputError, match="is no data set; use one of digits, mnist, synthetic") as caught:
        load(name)  # type: ignore[arg-type]
    assert repr(name) in str(caught.value)


@pytest.mark.parametrize("name", DATASETS)
def test_unknown_option_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=r"has no option 'shuffle'; use .*n_train"):
        load(name, shuffle=True)


@pytest.mark.parametrize("option", ["n_train", "n_test"])
@pytest.mark.parametrize("value", [0, -1, 2.0, "3", True, 10**9])
@pytest.mark.parametrize("name", ["digits", "mnist"])
def test_limits_are_checked(cache: Path, name: str, option: str, value: object) -> None:
    with pytest.raises(InvalidInputError, match=rf"{option}=.* must be an integer from 1 to \d+"):
        load(name, **{option: value})


def assert_well_formed(data: Dataset) -> None:
    assert data.X_train.dtype == data.X_test.dtype == data.dtype
    assert data.X_train.shape == (data.n_train, data.n_features)
    assert data.X_test.shape == (data.n_test, data.n_features)
    assert data.y_train.shape == (data.n_train,)
    assert data.y_test.shape == (data.n_test,)
    for part in PARTS:
        array = getattr(data, part)
        assert array.flags.c_contiguous
        assert array.flags.writeable
        assert array.dtype.isnative
        if part.startswith("y"):
            assert array.dtype == np.int64
            assert array.min() >= 0
        else:
            assert np.isfinite(array).all()
            assert (array != 0).any(axis=1).all(), "a row is all zeros"


def test_dataset_cannot_be_reassigned_and_prints_short() -> None:
    data = load("digits")
    with pytest.raises(dataclasses.FrozenInstanceError):
        data.name = "other"  # type: ignore[misc]
    assert repr(data) == "Dataset(name='digits', X_train=(1438, 64), X_test=(359, 64), dtype=uint8)"


# --- digits ----------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_split_in_order() -> None:
    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    data = load("digits")
    assert_well_formed(data)
    assert (data.dtype, data.n_classes) == (np.uint8, 10)
    np.testing.assert_array_equal(np.vstack([data.X_train, data.X_test]), values)
    np.testing.assert_array_equal(np.concatenate([data.y_train, data.y_test]), labels)


def test_digits_limits_keep_the_first_rows() -> None:
    whole, part = load("digits"), load("digits", n_train=np.int64(11), n_test=3)
    assert_well_formed(part)
    for name, n_rows in zip(PARTS, (11, 11, 3, 3), strict=True):
        np.testing.assert_array_equal(getattr(part, name), getattr(whole, name)[:n_rows])


# --- synthetic -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "dtype"), KIND_AND_DTYPE)
@pytest.mark.parametrize("n_features", [1, 2, 33])
def test_synthetic_is_well_formed(kind: str, dtype: str, n_features: int) -> None:
    data = load("synthetic", kind=kind, dtype=dtype, n_features=n_features, n_train=400, n_test=50, n_classes=4)
    assert_well_formed(data)
    assert (data.n_train, data.n_test, data.n_features, data.n_classes) == (400, 50, n_features, 4)
    assert data.dtype == np.dtype(dtype)


@pytest.mark.parametrize(("kind", "dtype"), KIND_AND_DTYPE)
def test_synthetic_repeats_and_a_larger_set_begins_with_the_smaller(
    kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kind": kind, "dtype": dtype, "n_features": 5, "seed": 3}
    small = load("synthetic", n_train=20, n_test=10, **options)
    monkeypatch.setattr(datasets, "_BLOCK_BYTES", 7 * 5 * 8)  # blocks of 7 rows
    large = load("synthetic", n_train=60, n_test=31, **options)
    for part in PARTS:
        assert getattr(small, part).tobytes() == getattr(large, part)[: len(getattr(small, part))].tobytes()
    other = load("synthetic", n_train=20, n_test=10, **(options | {"seed": 4}))
    assert small.X_train.tobytes() != other.X_train.tobytes()
    assert small.X_train[:10].tobytes() != small.X_test.tobytes()


def test_kinds_are_described_and_the_ordinary_one_is_not_adversarial() -> None:
    assert set(SYNTHETIC_KINDS) - set(ADVERSARIAL_KINDS) == {"clusters"}
    assert len(ADVERSARIAL_KINDS) == len(SYNTHETIC_KINDS) - 1
    assert all(datasets._KINDS[kind].make.__doc__ for kind in SYNTHETIC_KINDS)


def squared_distances(data: Dataset) -> np.ndarray:
    """Squared distances of test points to training points by the direct form."""
    X, Y = data.X_test.astype(np.float64), data.X_train.astype(np.float64)
    return ((X[:, None, :] - Y[None, :, :]) ** 2).sum(axis=2)


def gram_error(data: Dataset, *, centre: bool) -> float:
    """Largest error of the Gram form in the data's own dtype, over the median within a class (squared)."""
    mean = data.X_train.mean(axis=0, dtype=np.float64) if centre else 0.0
    X, Y = ((points - mean).astype(data.dtype) for points in (data.X_test, data.X_train))
    gram = (X * X).sum(axis=1)[:, None] + (Y * Y).sum(axis=1)[None, :] - 2 * (X @ Y.T)
    true = squared_distances(data)
    same_class = true[data.y_test[:, None] == data.y_train[None, :]]
    return float(np.abs(gram - true).max() / np.median(same_class))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_float_kinds_break_what_they_say(dtype: str) -> None:
    eps = np.finfo(dtype).eps
    options = {"dtype": dtype, "n_train": 300, "n_test": 40, "n_features": 16}
    by_kind = {kind: load("synthetic", kind=kind, **options) for kind in SYNTHETIC_KINDS}

    assert gram_error(by_kind["clusters"], centre=False) < 1e3 * eps
    assert gram_error(by_kind["far"], centre=False) > 0.1
    assert gram_error(by_kind["far"], centre=True) < 1e3 * eps
    assert gram_error(by_kind["far-apart"], centre=True) > 0.1
    assert gram_error(by_kind["near-duplicates"], centre=True) > 1.0

    near = by_kind["near-duplicates"]
    for label in range(10):
        rows = near.X_train[near.y_train == label]
        assert (rows.max(axis=0) <= rows.min(axis=0) * (1 + 4 * eps)).all()
    assert len(np.unique(near.X_train, axis=0)) == 300

    spread = by_kind["dominating"].X_train.astype(np.float64).var(axis=0)
    assert spread[0] > 0.1 / eps * spread[1:].max()

    tiny_values = np.abs(by_kind["denormals"].X_train)
    assert tiny_values.max() < np.finfo(dtype).tiny
    assert not (by_kind["denormals"].X_train ** 2).any()


@pytest.mark.parametrize("dtype", synthetic_dtypes("ties"))
def test_ties_are_many_and_exact(dtype: str) -> None:
    data = load("synthetic", kind="ties", dtype=dtype, n_train=300, n_test=20, n_features=8)
    assert set(np.unique(data.X_train)) == {1, 2}
    assert all(len(np.unique(row)) <= 9 for row in squared_distances(data))
    assert len(np.unique(data.X_train, axis=0)) < 200


def test_uint8_kinds_reach_the_ends_of_the_range() -> None:
    options = {"dtype": "uint8", "n_train": 200, "n_test": 20, "n_features": 8}
    assert load("synthetic", kind="far", **options).X_train.min() > 230
    apart = load("synthetic", kind="far-apart", **options).X_train
    assert set(np.unique(apart)) <= {*range(1, 25), *range(230, 256)}
    near = load("synthetic", kind="near-duplicates", **options)
    assert all(np.ptp(near.X_train[near.y_train == label], axis=0).max() <= 3 for label in range(10))
    dominating = load("synthetic", kind="dominating", **options).X_train
    assert np.ptp(dominating[:, 0]) > 10 * np.ptp(dominating[:, 1:])


def test_dtype_is_taken_in_any_spelling() -> None:
    for spelling in ("float64", np.float64, np.dtype(">f8"), float):
        assert load("synthetic", dtype=spelling).dtype == np.dtype("float64")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "denormals", "dtype": "uint8"}, "dtype='uint8' does not fit .*use one of float32, float64"),
        ({"dtype": "int32"}, "dtype='int32' .*use one of float32, float64, uint8"),
        ({"dtype": "no such type"}, "dtype='no such type'"),
        ({"dtype": None}, "dtype=None"),
        ({"kind": "spiral"}, "kind='spiral' is no kind .*use one of clusters, far"),
        ({"kind": ["far"]}, "is no kind of synthetic data"),
        ({"n_train": 0}, "n_train=0 must be an integer of at least 1"),
        ({"n_test": 1.5}, r"n_test=1\.5 must be an integer"),
        ({"n_features": 0}, "n_features=0"),
        ({"n_classes": 0}, "n_classes=0"),
        ({"seed": -1}, "seed=-1 must be an integer of at least 0"),
        ({"seed": None}, "seed=None"),
    ],
)
def test_synthetic_refuses(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        load("synthetic", **options)


# --- mnist: finding and reading --------------------------------------------------------------------------


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
@pytest.mark.parametrize("place", ["data", "data/mnist", "cache/mnist"])
def test_mnist_is_found(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, compress: bool
) -> None:
    monkeypatch.setenv("KNNBENCH_DATA", str(tmp_path / "data"))
    assert best_available() == "digits"
    tiny.write(tmp_path / place, compress=compress)
    assert best_available() == "mnist"
    data = load("mnist")
    assert_well_formed(data)
    tiny.assert_same(data)
    assert data.name == "mnist"
    assert {entry.name: entry.where for entry in status()}["mnist"] == str(tmp_path / place)


def test_mnist_named_directory_comes_before_the_cache(
    tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write(cache)
    damaged = tiny.write(tmp_path / "data") / f"{tiny.name('y_test')}.gz"
    damaged.write_bytes(b"")
    monkeypatch.setenv("KNNBENCH_DATA", str(tmp_path / "data"))
    with pytest.raises(DatasetError, match="begins with bytes") as caught:
        load("mnist")
    assert str(damaged) in str(caught.value)
    damaged.unlink()  # not complete any more, so passed over
    tiny.assert_same(load("mnist"))


def test_mnist_limits_keep_the_first_rows(tiny: Tiny, cache: Path) -> None:
    tiny.write(cache)
    data = load("mnist", n_train=3, n_test=2)
    assert_well_formed(data)
    np.testing.assert_array_equal(data.X_train, tiny.arrays["X_train"][:3].reshape(3, 16))
    np.testing.assert_array_equal(data.y_test, tiny.arrays["y_test"][:2])


def test_mnist_absent_says_where_it_looked_and_what_to_do(
    tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny.write(tmp_path / "data" / "mnist")
    (data / f"{tiny.name('y_train')}.gz").unlink()
    monkeypatch.setenv("KNNBENCH_DATA", str(data.parent))
    with pytest.raises(DatasetError) as caught:
        load("mnist")
    message = str(caught.value)
    assert f"{data} (no train-labels-idx1-ubyte[.gz])" in message
    assert f"{data.parent} (no train-images" in message
    assert f"{cache} (No such file" in message
    assert "knnbench data fetch mnist" in message
    assert "KNNBENCH_DATA" in message
    entry = status()[1]
    assert (entry.name, entry.available, entry.where, entry.reason) == ("mnist", False, "", message)
    assert best_available() == "digits"


def test_mnist_unreadable_directory_is_named(
    tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("KNNBENCH_DATA", str(tmp_path / "file"))
    with pytest.raises(DatasetError, match=r"file \(Not a directory\)"):
        load("mnist")

    def refuse(path: object) -> list[str]:
        raise PermissionError(13, "Permission denied", str(path))

    # Not by chmod: the superuser may read everything, and tests may run as it.
    monkeypatch.setattr(os, "listdir", refuse)
    with pytest.raises(DatasetError, match=r"\(Permission denied\)"):
        load("mnist")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: gzip.compress(content)[:-9], "is truncated or damaged gzip"),
        (lambda content: gzip.compress(content)[:5], "is truncated or damaged gzip"),
        (lambda content: gzip.compress(content)[:-8] + bytes(8), "is truncated or damaged gzip .*CRC"),
        (lambda content: gzip.compress(content)[:10] + b"\xff" * 40, "is truncated or damaged gzip"),
        (lambda content: b"", "begins with bytes ''"),
        (lambda content: b"<!DOCTYPE html>", "begins with bytes '3c21444f' where IDX has '00000803'"),
        (lambda content: content[:6], "is truncated: 6 bytes where the header alone has 16"),
        (lambda content: content[:-1], "holds only 335 bytes where its header announces 336"),
        (lambda content: content + b"\0", "holds more than 336 bytes"),
        (lambda content: gzip.compress(content + bytes(10**6)), "holds more than 336 bytes"),
        (lambda content: content[:4] + b"\0\0\0\7" + content[8:], r"shape \(7, 4, 4\) where \(20, 4, 4\)"),
        (lambda content: content[:2] + b"\x0d" + content[3:], "where IDX has '00000803'"),
        (lambda content: content[:-1] + bytes((content[-1] ^ 1,)), "has sha256 .* is expected"),
    ],
)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_damaged_file_is_named(
    tiny: Tiny, cache: Path, damage: Callable[[bytes], bytes], message: str, suffix: str
) -> None:
    tiny.write(cache, compress=bool(suffix))
    path = cache / f"{tiny.name('X_train')}{suffix}"
    path.write_bytes(damage(tiny.content["X_train"]))
    with pytest.raises(DatasetError, match=message) as caught:
        load("mnist")
    assert str(caught.value).startswith(str(path))
    assert str(caught.value).endswith("Remove it, then run `knnbench data fetch mnist`.")


def test_mnist_label_out_of_range_is_named(tiny: Tiny, cache: Path) -> None:
    tiny.write(cache)
    path = cache / f"{tiny.name('y_test')}.gz"
    path.write_bytes(tiny.content["y_test"][:-1] + b"\x0a")
    with pytest.raises(DatasetError, match="holds label 10 where 0 to 9 are expected"):
        load("mnist")


def test_mnist_path_that_cannot_be_opened_is_named(tiny: Tiny, cache: Path) -> None:
    tiny.write(cache)
    path = cache / f"{tiny.name('y_test')}.gz"
    path.unlink()
    path.mkdir()
    with pytest.raises(DatasetError, match="cannot be read") as caught:
        load("mnist")
    assert str(path) in str(caught.value)


def test_status_describes_what_load_returns(tiny: Tiny, cache: Path) -> None:
    tiny.write(cache)
    entries = status()
    assert tuple(entry.name for entry in entries) == DATASETS
    assert [entry.where for entry in entries] == ["embedded", str(cache), "generated"]
    for entry in entries:
        data = load(entry.name)
        assert (entry.available, entry.reason) == (True, "")
        assert (entry.train_shape, entry.test_shape) == (data.X_train.shape, data.X_test.shape)
        assert entry.dtype == data.dtype.name


def test_cache_is_the_users_where_nothing_else_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import platformdirs

    monkeypatch.delenv("KNNBENCH_CACHE", raising=False)
    assert datasets._cache_directory() == platformdirs.user_cache_path("knnbench") / "mnist"


# --- mnist: downloading ----------------------------------------------------------------------------------


@dataclasses.dataclass
class Server:
    """A mirror on this machine: `pages` by path, `cut` = close half-way, `asked` = paths in order."""

    url: str
    pages: dict[str, bytes]
    cut: bool = False
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    asked: list[str] = dataclasses.field(default_factory=list)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start mirrors; all are stopped at the end."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running = []

    def start(pages: dict[str, bytes], *, cut: bool = False) -> Server:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                mirror.asked.append(self.path)
                body = mirror.pages.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                for key, value in mirror.headers.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if mirror.cut else body)

            def log_message(self, format: str, *args: object) -> None:
                """Keep the tests' output clean."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = False  # so that closing waits for them and leaves no open socket
        mirror = Server(f"http://127.0.0.1:{server.server_port}", pages, cut)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        running.append((server, thread))
        return mirror

    yield start
    for server, thread in running:
        server.shutdown()
        server.server_close()
        thread.join()


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir()) if directory.exists() else []


def test_nothing_is_downloaded_unless_asked(tiny: Tiny, cache: Path, serve: Callable[..., Server]) -> None:
    mirror = serve(tiny.pages())
    with pytest.raises(DatasetError, match="were not found"):
        load("mnist", mirrors=[mirror.url])
    assert not mirror.asked
    assert not cache.exists()


@pytest.mark.parametrize("slash", ["", "/"])
def test_download_fills_the_cache_once(
    tiny: Tiny, cache: Path, serve: Callable[..., Server], slash: str, capfd: pytest.CaptureFixture[str]
) -> None:
    mirror = serve(tiny.pages())
    tiny.assert_same(load("mnist", download=True, mirrors=[mirror.url + slash]))
    assert sorted(mirror.asked) == sorted(tiny.pages())
    assert names_in(cache) == sorted(path[1:] for path in tiny.pages())
    assert fetch_mnist(mirrors=[mirror.url]) == cache
    tiny.assert_same(load("mnist", download=True, mirrors=[mirror.url]))
    tiny.assert_same(load("mnist"))
    assert len(mirror.asked) == 4
    assert capfd.readouterr() == ("", "")  # no terminal, no bar; and pooch does not log


def test_download_is_not_needed_where_a_named_directory_has_the_files(
    tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KNNBENCH_DATA", str(tiny.write(tmp_path / "data")))
    tiny.assert_same(load("mnist", download=True, mirrors=["http://127.0.0.1:9/"]))
    assert not cache.exists()


@pytest.mark.parametrize("compress", [True, False], ids=["gz", "plain"])
def test_download_replaces_only_what_is_damaged(
    tiny: Tiny, cache: Path, serve: Callable[..., Server], compress: bool
) -> None:
    mirror = serve(tiny.pages())
    tiny.write(cache, compress=compress)
    damaged = cache / (tiny.name("y_train") + (".gz" if compress else ""))
    damaged.write_bytes(b"damaged")
    tiny.assert_same(load("mnist", download=True, mirrors=[mirror.url]))
    assert mirror.asked == [f"/{tiny.name('y_train')}.gz"]
    tiny.assert_same(load("mnist"))
    assert len(names_in(cache)) == 4


def test_download_takes_what_the_transport_has_decompressed(
    tiny: Tiny, cache: Path, serve: Callable[..., Server]
) -> None:
    mirror = serve(tiny.pages())
    mirror.headers["Content-Encoding"] = "gzip"
    tiny.assert_same(load("mnist", download=True, mirrors=[mirror.url]))
    assert names_in(cache) == sorted(tiny.name(part) for part in PARTS)
    tiny.assert_same(load("mnist"))


def test_download_falls_back_and_then_stays_with_the_mirror_that_answers(
    tiny: Tiny, cache: Path, serve: Callable[..., Server]
) -> None:
    empty, good = serve({}), serve(tiny.pages())
    tiny.assert_same(load("mnist", download=True, mirrors=(empty.url, good.url)))
    assert len(empty.asked) == 1
    assert len(good.asked) == 4


@pytest.mark.parametrize("how", ["wrong", "html", "truncated", "cut", "refused"])
def test_download_that_fails_is_replaced_by_the_next_mirror_or_leaves_the_cache_clean(
    tiny: Tiny, cache: Path, serve: Callable[..., Server], how: str
) -> None:
    pages = tiny.pages()
    image_path = f"/{tiny.name('X_test')}.gz"
    if how == "wrong":
        content = tiny.content["X_test"]
        pages[image_path] = gzip.compress(content[:-1] + bytes((content[-1] ^ 1,)))
    elif how == "html":
        pages[image_path] = b"<html>Please log in to the wireless network</html>"
    elif how == "truncated":
        pages[image_path] = pages[image_path][:-20]
    bad = serve(pages, cut=how == "cut")
    address = "http://127.0.0.1:9" if how == "refused" else bad.url
    expected = {
        "wrong": "what it sent has sha256",
        "html": "what it sent begins with bytes",
        "truncated": "what it sent is truncated or damaged gzip",
        "cut": "IncompleteRead",
        "refused": "ConnectionError",
    }[how]

    with pytest.raises(DatasetError, match="could not be downloaded from any mirror") as caught:
        load("mnist", download=True, mirrors=[address, f"{bad.url}/elsewhere"])
    reasons = str(caught.value).splitlines()[1:-1]
    assert [reason.strip().split(".gz: ")[0].rsplit("/", 1)[0] for reason in reasons] == [
        address,
        f"{bad.url}/elsewhere",
    ]
    assert expected in reasons[0]
    assert "404" in reasons[1]
    # Files that verified before the failure may stay; nothing else may.
    kept = ["train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"]
    assert names_in(cache) == (kept if how in ("wrong", "html", "truncated") else [])

    good = serve(tiny.pages())
    tiny.assert_same(load("mnist", download=True, mirrors=[address, good.url]))
    assert len(names_in(cache)) == 4


def test_download_that_is_interrupted_leaves_the_cache_clean(
    tiny: Tiny, cache: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = serve(tiny.pages())

    def interrupt(bar: object, n_bytes: int) -> None:
        assert len(list(cache.glob(".download-*/*"))) == 1, "the interruption comes before the file does"
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(datasets._PoochBar, "update", interrupt)
        with pytest.raises(KeyboardInterrupt):
            fetch_mnist(mirrors=[mirror.url, mirror.url])
    assert len(mirror.asked) == 1
    assert names_in(cache) == []
    fetch_mnist(mirrors=[mirror.url])
    tiny.assert_same(load("mnist"))


def test_downloads_at_the_same_time_do_not_disturb_each_other(
    tiny: Tiny, cache: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch
) -> None:
    mirror = serve(tiny.pages())
    together = threading.Barrier(4, timeout=10)
    download = datasets._download

    def wait_then_download(*args: object) -> object:
        together.wait()
        return download(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(datasets, "_download", wait_then_download)
    with ThreadPoolExecutor(4) as pool:
        for data in pool.map(lambda _: load("mnist", download=True, mirrors=[mirror.url]), range(4)):
            tiny.assert_same(data)
    assert len(mirror.asked) == 16
    assert names_in(cache) == sorted(path[1:] for path in tiny.pages())


def test_cache_that_cannot_be_written_is_named(tiny: Tiny, cache: Path, serve: Callable[..., Server]) -> None:
    mirror = serve(tiny.pages())
    cache.parent.write_bytes(b"a file where the directory should be")
    with pytest.raises(DatasetError, match=r"cannot be written .*KNNBENCH_CACHE") as caught:
        fetch_mnist(mirrors=[mirror.url])
    assert str(cache) in str(caught.value)
    assert not mirror.asked


@pytest.mark.parametrize("mirrors", [[], "https://example.org/", ["ftp://example.org/"], [None], None])
def test_mirrors_are_checked(cache: Path, mirrors: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="must be a list or tuple of one or more addresses"):
        fetch_mnist(mirrors=mirrors)


def test_own_mirrors_are_several_and_secure() -> None:
    assert len(MNIST_MIRRORS) >= 2
    assert all(mirror.startswith("https://") for mirror in MNIST_MIRRORS)


def test_progress_is_shown_on_a_terminal(
    tiny: Tiny, cache: Path, serve: Callable[..., Server], monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes stderr for a terminal
    mirror = serve(tiny.pages())
    fetch_mnist(mirrors=[mirror.url])
    shown = capfd.readouterr()
    assert shown.out == ""
    assert shown.err.count("100%") >= 4
    assert all(tiny.name(part) in shown.err for part in PARTS)

    for path in cache.iterdir():
        path.unlink()
    fetch_mnist(mirrors=[mirror.url], progress=False)
    assert capfd.readouterr() == ("", "")


def test_bar_of_unknown_length_is_not_finished() -> None:
    from rich.progress import Progress

    display = Progress(disable=True)
    bar = datasets._PoochBar(display, display.add_task("file", total=None))
    for total, expected in ((0, None), (200, 200)):
        bar.total = total
        assert bar.total == expected
        bar.update(150)
        assert not display.finished
        bar.reset()
        assert display.tasks[0].completed == 0
    bar.update(200)
    bar.close()
    assert display.finished


# --- mnist: the real files -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real() -> Dataset:
    if not os.environ.get("KNNBENCH_DATA"):
        pytest.skip("KNNBENCH_DATA does not name a directory with the files of MNIST")
    if best_available() != "mnist":
        pytest.skip("KNNBENCH_DATA and the cache do not hold the files of MNIST")
    return load("mnist")


def test_real_mnist_is_what_it_is_known_to_be(real: Dataset) -> None:
    assert_well_formed(real)
    assert real.dtype == np.uint8
    assert (real.X_train.shape, real.X_test.shape) == ((60_000, 784), (10_000, 784))
    assert np.bincount(real.y_train).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert real.y_test[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert round(float(real.X_train.mean() / 255), 4) == 0.1307


def test_real_mnist_matches_its_status(real: Dataset) -> None:
    entry = status()[1]
    assert (entry.name, entry.available) == ("mnist", True)
    assert (entry.train_shape, entry.test_shape) == (real.X_train.shape, real.X_test.shape)
