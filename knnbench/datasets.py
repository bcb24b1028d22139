"""Data sets to measure on: real digits at two sizes, and generated points, ordinary and adversarial.

=============  ================================================  =====================================
name           what it is                                        where it comes from
=============  ================================================  =====================================
``digits``     1,797 images of 8 x 8, uint8 in 0..16             embedded in scikit-learn
``mnist``      70,000 images of 28 x 28, uint8                   ``KNNBENCH_DATA``, the cache, download
``synthetic``  class clusters, or points that break a kernel     a seeded generator
=============  ================================================  =====================================

Nothing is downloaded unless the caller asks for it, and nothing of MNIST is returned, or kept in the
cache, before the sha256 of its decompressed bytes has been checked.
"""

import gzip
import hashlib
import inspect
import math
import operator
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from knnbench.errors import DatasetError, InvalidInputError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

__all__ = [
    "ADVERSARIAL_KINDS",
    "DATASETS",
    "MNIST_MIRRORS",
    "SYNTHETIC_KINDS",
    "Dataset",
    "DatasetStatus",
    "best_available",
    "fetch_mnist",
    "load",
    "status",
    "synthetic_dtypes",
]

MNIST_MIRRORS: tuple[str, ...] = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
"""Where `fetch_mnist` asks for the four files, in this order."""


class _IdxFile(NamedTuple):
    name: str
    shape: tuple[int, ...]
    sha256: str  # of the decompressed bytes: mirrors compress differently


_MNIST_FILES: dict[str, _IdxFile] = {
    "X_train": _IdxFile(
        "train-images-idx3-ubyte",
        (60_000, 28, 28),
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    "y_train": _IdxFile(
        "train-labels-idx1-ubyte",
        (60_000,),
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    "X_test": _IdxFile(
        "t10k-images-idx3-ubyte",
        (10_000, 28, 28),
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    "y_test": _IdxFile(
        "t10k-labels-idx1-ubyte",
        (10_000,),
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
}
_MNIST_CLASSES = 10

_DIGITS_SHAPE = (1797, 64)
_DIGITS_TEST = _DIGITS_SHAPE[0] // 5

_GZIP_MAGIC = b"\x1f\x8b"
_IDX_UBYTE = 0x08
_TIMEOUT_S = 30.0
_CHUNK_BYTES = 1 << 16
_BLOCK_BYTES = 1 << 25


@dataclass(frozen=True, eq=False, repr=False, slots=True)
class Dataset:
    """Points and labels, split into a training set and a test set.

    Every array is C-contiguous, writable and owned by the caller.

    Attributes
    ----------
    X_train : ndarray of shape (n_train, n_features)
        Training points; uint8 for images, else the dtype asked for.
    y_train : ndarray of shape (n_train,), int64
        Their classes, from 0.
    X_test : ndarray of shape (n_test, n_features), same dtype as `X_train`
        Test points.
    y_test : ndarray of shape (n_test,), int64
        Their classes.
    name : str
        The name it was loaded by.

    Examples
    --------
    >>> from knnbench.datasets import load
    >>> data = load("digits", n_train=100)
    >>> data
    Dataset(name='digits', X_train=(100, 64), X_test=(359, 64), dtype=uint8)
    >>> data.n_features, data.n_classes
    (64, 10)
    """

    X_train: npt.NDArray[Any]
    y_train: npt.NDArray[np.int64]
    X_test: npt.NDArray[Any]
    y_test: npt.NDArray[np.int64]
    name: str

    @property
    def n_train(self) -> int:
        """Number of training points."""
        return int(self.X_train.shape[0])

    @property
    def n_test(self) -> int:
        """Number of test points."""
        return int(self.X_test.shape[0])

    @property
    def n_features(self) -> int:
        """Length of one point; for images, the number of pixels."""
        return int(self.X_train.shape[1])

    @property
    def n_classes(self) -> int:
        """Number of distinct labels among the training points."""
        return int(np.unique(self.y_train).size)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values of `X_train` and `X_test`."""
        return self.X_train.dtype

    def __repr__(self) -> str:
        """Give the name, the shapes and the dtype instead of thousands of numbers."""
        return (
            f"Dataset(name={self.name!r}, X_train={self.X_train.shape}, X_test={self.X_test.shape}, dtype={self.dtype})"
        )


@dataclass(frozen=True, slots=True)
class DatasetStatus:
    """What is known of one data set without loading it.

    Attributes
    ----------
    name : str
        One of `DATASETS`.
    available : bool
        Whether `load(name)` can be expected to work as things are.
    where : str
        The directory that holds its files, or ``"embedded"``, or ``"generated"``; ``""`` if it is absent.
    train_shape, test_shape : tuple of int
        Shapes of `X_train` and `X_test`, as `load(name)` gives them without options.
    dtype : str
        Their dtype, as `load(name)` gives it without options.
    reason : str
        If it is absent, why, and how to get it; else ``""``.
    """

    name: str
    available: bool
    where: str
    train_shape: tuple[int, int]
    test_shape: tuple[int, int]
    dtype: str
    reason: str = ""


def load(name: str, **options: Any) -> Dataset:
    """Load a data set by name.

    Parameters
    ----------
    name : {"digits", "mnist", "synthetic"}
        Which one.
    **options
        For ``"digits"`` and ``"mnist"``:

        n_train, n_test : int, optional
            Keep only the first rows of the training or the test set; all of them by default.

        For ``"mnist"`` also:

        download : bool, default False
            Whether an absent, or damaged, copy in the cache may be downloaded: see `fetch_mnist`.
        mirrors, progress
            Passed on to `fetch_mnist`.

        For ``"synthetic"``:

        n_train, n_test : int, default 1000 and 200
            Numbers of points. The first rows do not depend on them: a larger set begins with the smaller.
        n_features : int, default 32
            Length of one point.
        n_classes : int, default 10
            Number of classes that the labels are drawn from.
        dtype : {"float32", "float64", "uint8"}, default "float32"
            Type of the values; `synthetic_dtypes` says which of them a kind can have.
        seed : int, default 0
            Same seed, same options and same release of numpy: same bytes.
        kind : str, default "clusters"
            One of `SYNTHETIC_KINDS`.

    Returns
    -------
    Dataset
        `X_train` (n_train, n_features), `y_train` (n_train,), `X_test` (n_test, n_features),
        `y_test` (n_test,).

    Raises
    ------
    InvalidInputError
        For an unknown name or option, or for a value that an option cannot have.
    DatasetError
        If files of MNIST are absent, damaged, or could not be downloaded.

    Notes
    -----
    ``digits`` keeps scikit-learn's order; the last fifth (359 rows) is the test set. ``mnist`` keeps the
    original order and split. Its files, compressed or not, are looked for in ``$KNNBENCH_DATA/mnist``, in
    ``$KNNBENCH_DATA`` and in the cache (``$KNNBENCH_CACHE/mnist``; without that variable, ``mnist`` in the
    user's cache directory for knnbench). The first directory that holds all four is read, and verified every
    time.

    Synthetic values are finite and no row is all zeros. For uint8, values lie in 1..255.

    Examples
    --------
    >>> from knnbench.datasets import load
    >>> load("digits")
    Dataset(name='digits', X_train=(1438, 64), X_test=(359, 64), dtype=uint8)
    >>> load("synthetic", kind="ties", n_train=4, n_test=1, n_features=3, dtype="uint8").X_train.max()
    np.uint8(2)
    >>> load("iris")
    Traceback (most recent call last):
    ...
    knnbench.errors.InvalidInputError: name='iris' is no data set; use one of digits, mnist, synthetic.
    """
    loader = _LOADERS.get(name) if isinstance(name, str) else None
    if loader is None:
        raise InvalidInputError(f"{name=} is no data set; use one of {', '.join(DATASETS)}.")
    accepted = inspect.signature(loader).parameters
    unknown = [option for option in options if option not in accepted]
    if unknown:
        raise InvalidInputError(
            f"data set {name!r} has no option {', '.join(map(repr, unknown))}; use {', '.join(accepted)}."
        )
    return loader(**options)


def best_available() -> str:
    """Name the most telling real data set that is here already: MNIST if its files are, else digits.

    Returns
    -------
    {"mnist", "digits"}
        Chosen by the presence of the files; their contents are verified by `load`.

    Examples
    --------
    >>> from knnbench.datasets import best_available
    >>> best_available() in ("mnist", "digits")
    True
    """
    files, _ = _find_mnist()
    return "mnist" if files else "digits"


def status() -> list[DatasetStatus]:
    """Say of each data set whether it can be loaded, from where, and how large it is.

    Cheap: of MNIST only the names of the files are looked at. That they can be read and hold what they should
    is verified by `load`. Of digits, only whether scikit-learn is installed.

    Returns
    -------
    list of DatasetStatus
        One for each of `DATASETS`, in that order.

    Examples
    --------
    >>> from knnbench.datasets import status
    >>> [entry.name for entry in status()]
    ['digits', 'mnist', 'synthetic']
    >>> status()[2].where
    'generated'
    """
    has_sklearn = find_spec("sklearn") is not None
    n_digits, n_digit_features = _DIGITS_SHAPE
    digits = DatasetStatus(
        name="digits",
        available=has_sklearn,
        where="embedded" if has_sklearn else "",
        train_shape=(n_digits - _DIGITS_TEST, n_digit_features),
        test_shape=(_DIGITS_TEST, n_digit_features),
        dtype="uint8",
        reason="" if has_sklearn else "scikit-learn is not installed; run `pip install scikit-learn`.",
    )
    files, absent = _find_mnist()
    n_train, *train_image = _MNIST_FILES["X_train"].shape
    n_test, *test_image = _MNIST_FILES["X_test"].shape
    mnist = DatasetStatus(
        name="mnist",
        available=bool(files),
        where=str(files["X_train"].parent) if files else "",
        train_shape=(n_train, math.prod(train_image)),
        test_shape=(n_test, math.prod(test_image)),
        dtype="uint8",
        reason=absent,
    )
    sample = load("synthetic")
    synthetic = DatasetStatus(
        name="synthetic",
        available=True,
        where="generated",
        train_shape=(sample.n_train, sample.n_features),
        test_shape=(sample.n_test, sample.n_features),
        dtype=sample.dtype.name,
    )
    return [digits, mnist, synthetic]


def fetch_mnist(*, mirrors: Iterable[str] = MNIST_MIRRORS, progress: bool = True) -> Path:
    """Download into the cache those of the four MNIST files that it lacks, about 11 MB together.

    A file that is there already and verifies is left alone; one that does not verify is replaced. Each file
    is downloaded into a directory beside the cache's own files, verified, and only then put in place, in one
    step: whatever interrupts the download, and however many processes download at once, a file of the cache
    is whole and right, or not there.

    Parameters
    ----------
    mirrors : iterable of str, default `MNIST_MIRRORS`
        Addresses (http or https) of directories that hold the ``.gz`` files, in the order to try them.
    progress : bool, default True
        Whether to show a progress bar, on stderr, where that is a terminal.

    Returns
    -------
    pathlib.Path
        The directory that holds the files: ``$KNNBENCH_CACHE/mnist``, or ``mnist`` in the user's cache
        directory for knnbench.

    Raises
    ------
    InvalidInputError
        If `mirrors` is empty, a string, or holds something that is no http or https address.
    DatasetError
        If a file could not be had from any mirror, with the reason for each of them, or if the cache cannot
        be written.
    """
    _fetch(_checked_mirrors(mirrors), progress=progress)
    return _cache_directory()


def synthetic_dtypes(kind: str) -> tuple[str, ...]:
    """Name the dtypes that a kind of synthetic data can have.

    Parameters
    ----------
    kind : str
        One of `SYNTHETIC_KINDS`.

    Returns
    -------
    tuple of str
        Values for the option `dtype` of ``load("synthetic", kind=kind)``.

    Raises
    ------
    InvalidInputError
        For an unknown kind.

    Examples
    --------
    >>> from knnbench.datasets import synthetic_dtypes
    >>> synthetic_dtypes("denormals")
    ('float32', 'float64')
    """
    entry = _KINDS.get(kind) if isinstance(kind, str) else None
    if entry is None:
        raise InvalidInputError(f"{kind=} is no kind of synthetic data; use one of {', '.join(SYNTHETIC_KINDS)}.")
    return entry.dtypes


def _integer(name: str, value: Any, *, least: int, most: int | None = None) -> int:
    expected = f"an integer of at least {least}" if most is None else f"an integer from {least} to {most}"
    try:
        number = operator.index(value)
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least or (most is not None and number > most):
        raise InvalidInputError(f"{name}={value!r} must be {expected}.")
    return number


# --- digits ----------------------------------------------------------------------------------------------


def _load_digits(*, n_train: int | None = None, n_test: int | None = None) -> Dataset:
    most_train = _DIGITS_SHAPE[0] - _DIGITS_TEST
    first = most_train if n_train is None else _integer("n_train", n_train, least=1, most=most_train)
    rest = _DIGITS_TEST if n_test is None else _integer("n_test", n_test, least=1, most=_DIGITS_TEST)

    from sklearn.datasets import load_digits

    values, labels = load_digits(return_X_y=True)
    test = slice(most_train, most_train + rest)
    return Dataset(
        X_train=values[:first].astype(np.uint8),
        y_train=labels[:first].astype(np.int64),
        X_test=values[test].astype(np.uint8),
        y_test=labels[test].astype(np.int64),
        name="digits",
    )


# --- mnist: finding and reading --------------------------------------------------------------------------


class _RejectedError(Exception):
    """A file is not what it should be; the text completes a sentence that begins with the file's name."""


def _cache_directory() -> Path:
    root = os.environ.get("KNNBENCH_CACHE")
    if root:
        return Path(os.path.expanduser(root)) / "mnist"

    from platformdirs import user_cache_path

    return user_cache_path("knnbench") / "mnist"


def _files_in(directory: Path) -> tuple[dict[str, Path], str]:
    """Find files of MNIST by name; the text says why some are missing, and is empty if none is."""
    try:
        names = set(os.listdir(directory))
    except OSError as error:
        return {}, error.strerror or str(error)
    found: dict[str, Path] = {}
    for part, file in _MNIST_FILES.items():
        for name in (file.name, f"{file.name}.gz"):
            if name in names:
                found[part] = directory / name
                break
    missing = [f"{file.name}[.gz]" for part, file in _MNIST_FILES.items() if part not in found]
    return found, f"no {', '.join(missing)}" if missing else ""


def _find_mnist() -> tuple[dict[str, Path], str]:
    """Find the first directory that holds all files; else the text says where was looked and what to do."""
    places = [_cache_directory()]
    root = os.environ.get("KNNBENCH_DATA")
    if root:
        data = Path(os.path.expanduser(root))
        places = [data / "mnist", data, *places]
    looked = []
    for place in places:
        found, problem = _files_in(place)
        if not problem:
            return found, ""
        looked.append(f"{place} ({problem})")
    return {}, (
        f"the files of MNIST were not found. Looked in {'; '.join(looked)}. Run `knnbench data fetch mnist`, "
        "or load with download=True, or set KNNBENCH_DATA to a directory that holds them."
    )


def _decode(path: Path, expected: _IdxFile) -> npt.NDArray[np.uint8]:
    """Read an IDX file, gzip or not, and verify it."""
    n_header = 4 + 4 * len(expected.shape)
    n_bytes = n_header + math.prod(expected.shape)
    try:
        with path.open("rb") as raw:
            # By content, not by name: http and some browsers decompress a file and leave it its name.
            compressed = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            raw.seek(0)
            # One byte more than allowed is enough to know, so that no file can fill the memory.
            if compressed:
                with gzip.open(raw) as unpacked:
                    content = unpacked.read(n_bytes + 1)
            else:
                content = raw.read(n_bytes + 1)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _RejectedError(f"is truncated or damaged gzip ({error})") from error
    except OSError as error:
        raise _RejectedError(f"cannot be read ({error.strerror or error})") from error

    magic = bytes((0, 0, _IDX_UBYTE, len(expected.shape)))
    if content[:4] != magic:
        raise _RejectedError(f"begins with bytes {content[:4].hex()!r} where IDX has {magic.hex()!r}")
    if len(content) < n_header:
        raise _RejectedError(f"is truncated: {len(content)} bytes where the header alone has {n_header}")
    shape = tuple(np.frombuffer(content[4:n_header], dtype=">u4").tolist())
    if shape != expected.shape:
        raise _RejectedError(f"holds an array of shape {shape} where {expected.shape} is expected")
    if len(content) != n_bytes:
        size = f"only {len(content)}" if len(content) < n_bytes else f"more than {n_bytes}"
        raise _RejectedError(f"holds {size} bytes where its header announces {n_bytes}")
    values = np.frombuffer(content, dtype=np.uint8, offset=n_header).reshape(shape)
    if values.ndim == 1 and values.max() >= _MNIST_CLASSES:
        raise _RejectedError(f"holds label {values.max()} where 0 to {_MNIST_CLASSES - 1} are expected")
    digest = hashlib.sha256(content).hexdigest()
    if digest != expected.sha256:
        raise _RejectedError(f"has sha256 {digest} where {expected.sha256} is expected (decompressed)")
    return values


def _load_mnist(
    *,
    n_train: int | None = None,
    n_test: int | None = None,
    download: bool = False,
    mirrors: Iterable[str] = MNIST_MIRRORS,
    progress: bool = True,
) -> Dataset:
    most_train, most_test = _MNIST_FILES["y_train"].shape[0], _MNIST_FILES["y_test"].shape[0]
    first = most_train if n_train is None else _integer("n_train", n_train, least=1, most=most_train)
    rest = most_test if n_test is None else _integer("n_test", n_test, least=1, most=most_test)
    order = _checked_mirrors(mirrors)

    files, absent = _find_mnist()
    if download and (not files or files["X_train"].parent == _cache_directory()):
        arrays = _fetch(order, progress=progress)
    elif files:
        arrays = {}
        for part, path in files.items():
            try:
                arrays[part] = _decode(path, _MNIST_FILES[part])
            except _RejectedError as error:
                remedy = "Remove it, then run `knnbench data fetch mnist`."
                raise DatasetError(f"{path} {error}. {remedy}") from error
    else:
        raise DatasetError(absent)

    # A copy, because the bytes of a file make a read-only array, of which torch.from_numpy warns.
    return Dataset(
        X_train=arrays["X_train"][:first].reshape(first, -1).copy(),
        y_train=arrays["y_train"][:first].astype(np.int64),
        X_test=arrays["X_test"][:rest].reshape(rest, -1).copy(),
        y_test=arrays["y_test"][:rest].astype(np.int64),
        name="mnist",
    )


# --- mnist: downloading ----------------------------------------------------------------------------------


class _PoochBar:
    """The members of a tqdm bar that pooch's downloader uses, on one task of rich's progress display."""

    def __init__(self, display: "Progress", task: "TaskID") -> None:
        self._display = display
        self._task = task

    @property
    def total(self) -> float | None:
        """Bytes to come; None while unknown."""
        return self._display.tasks[self._display.task_ids.index(self._task)].total

    @total.setter
    def total(self, n_bytes: int) -> None:
        # pooch gives 0 where the server does not tell the length; rich would call that finished.
        self._display.update(self._task, total=n_bytes or None)

    def update(self, n_bytes: int) -> None:
        """Count bytes that have come."""
        self._display.update(self._task, advance=n_bytes)

    def reset(self) -> None:
        """Count from zero again."""
        self._display.update(self._task, completed=0)

    def close(self) -> None:
        """Leave the bar on the display, which is closed by whoever opened it."""


def _checked_mirrors(mirrors: Iterable[str]) -> list[str]:
    # A lone string is refused too: it is taken for one mirror per letter, and no letter is an address.
    order = list(mirrors) if isinstance(mirrors, Iterable) else []
    if not order or not all(isinstance(m, str) and m.startswith(("http://", "https://")) for m in order):
        raise InvalidInputError(
            f"{mirrors=} must be a list or tuple of one or more addresses that begin with http:// or https://."
        )
    return order


def _fetch(mirrors: list[str], *, progress: bool) -> dict[str, npt.NDArray[np.uint8]]:
    """Bring the cache up to date and return what it holds, verified."""
    directory = _cache_directory()
    arrays: dict[str, npt.NDArray[np.uint8]] = {}
    for part, path in _files_in(directory)[0].items():
        with suppress(_RejectedError):
            arrays[part] = _decode(path, _MNIST_FILES[part])
    if arrays.keys() == _MNIST_FILES.keys():
        return arrays

    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskProgressColumn, TextColumn

    console = Console(stderr=True)
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        DownloadColumn(),
        console=console,
        disable=not (progress and console.is_terminal),
    )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # In the cache itself, because a file is moved in one step only within one file system.
        with tempfile.TemporaryDirectory(prefix=".download-", dir=directory) as scratch, display:
            for part, file in _MNIST_FILES.items():
                if part not in arrays:
                    bar = _PoochBar(display, display.add_task(file.name, total=None))
                    arrays[part], mirror = _download(file, mirrors, Path(scratch), directory, bar)
                    # The mirror that answered is asked first for the next file: a dead one costs a timeout.
                    mirrors = [mirror, *(other for other in mirrors if other != mirror)]
    except OSError as error:
        raise DatasetError(
            f"the cache directory {directory} cannot be written ({error.strerror or error}). "
            "Make it writable, or set KNNBENCH_CACHE to a directory that is."
        ) from error
    return arrays


def _download(
    file: _IdxFile, mirrors: list[str], scratch: Path, directory: Path, bar: _PoochBar
) -> tuple[npt.NDArray[np.uint8], str]:
    """Put a verified file into `directory`; return its array and the mirror that it came from."""
    from pooch import HTTPDownloader

    # The downloader alone, not pooch.retrieve: that verifies the compressed bytes, which differ between
    # mirrors, and logs to stderr.
    download = HTTPDownloader(progressbar=bar, chunk_size=_CHUNK_BYTES, timeout=_TIMEOUT_S)
    partial = scratch / file.name
    reasons = []
    for mirror in mirrors:
        url = f"{mirror.rstrip('/')}/{file.name}.gz"
        bar.reset()
        try:
            download(url, str(partial), None)
            array = _decode(partial, file)
        except _RejectedError as error:
            reasons.append(f"{url}: what it sent {error}")
            continue
        # All that requests raises is an OSError; an address it cannot parse may be a bare ValueError.
        except (OSError, ValueError) as error:
            reasons.append(f"{url}: {type(error).__name__}: {error}")
            continue
        plain, compressed = directory / file.name, directory / f"{file.name}.gz"
        with partial.open("rb") as raw:
            gzipped = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        target, other = (compressed, plain) if gzipped else (plain, compressed)
        os.replace(partial, target)
        other.unlink(missing_ok=True)  # else a damaged file of the other name would be found first
        return array, mirror
    listed = "".join(f"\n  {reason}" for reason in reasons)
    raise DatasetError(
        f"{file.name} could not be downloaded from any mirror:{listed}\n"
        "Check the network and try again, pass other mirrors, or set KNNBENCH_DATA to a directory that holds "
        "the files of MNIST."
    )


# --- synthetic -------------------------------------------------------------------------------------------
#
# A kind makes rows from `position`, float64 (n_rows, n_features): each row is the place of its class, uniform
# in [0, 1) and the same for all rows of the class; from a stream of random numbers, of which it takes equally
# many for every row; and from the dtype that the values will be rounded to. Rows depend on nothing else, so
# they can be made in blocks, and a larger set begins with the smaller.

_FloatArray = npt.NDArray[np.float64]


def _cancelling_offset(dtype: np.dtype[Any]) -> float:
    """Length whose square swallows a distance of 1: eps * offset**2 == 1."""
    return 1.0 / math.sqrt(float(np.finfo(dtype).eps))


def _clusters(position: _FloatArray, rng: np.random.Generator, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Gaussian clusters, one for each class, in the range of pixels: the ordinary case."""
    return 64.0 + 128.0 * position + 24.0 * rng.standard_normal(position.shape)


def _far(position: _FloatArray, rng: np.random.Generator, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Clusters far from the origin: |q|^2 + |c|^2 - 2 q.c cancels unless the mean is subtracted first.

    For uint8, close to 255: the largest sums that an integer accumulator meets.
    """
    noise = rng.standard_normal(position.shape)
    if dtype.kind == "u":
        return 242.0 + 8.0 * position + 2.0 * noise
    return 4.0 * _cancelling_offset(dtype) + 8.0 * position + noise


def _far_apart(position: _FloatArray, rng: np.random.Generator, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Tight clusters far from each other: no single point that is subtracted keeps the Gram form accurate.

    For uint8, at opposite ends of the range: the largest distances that an integer accumulator meets.
    """
    noise = rng.standard_normal(position.shape)
    if dtype.kind == "u":
        return np.where(position < 0.5, 5.0, 251.0) + 2.0 * noise
    offset = 4.0 * _cancelling_offset(dtype)
    return np.where(position < 0.5, -offset, offset) + noise


def _near_duplicates(position: _FloatArray, rng: np.random.Generator, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Each class is one point, from which its rows differ by 0 to 3 units in the last place.

    For uint8, the unit is 1. Rows that are equal occur where there are few features.
    """
    steps = rng.integers(0, 4, position.shape)
    point = _rounded(64.0 + 128.0 * position, dtype)
    unit = 1 if dtype.kind == "u" else np.spacing(point)
    rows: npt.NDArray[Any] = point + steps * unit
    return rows


def _ties(position: _FloatArray, rng: np.random.Generator, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Every value is 1 or 2: exact in any dtype, few different distances, and rows that are equal."""
    value = np.where(position < 0.5, 1, 2)
    return np.where(rng.random(position.shape) < 0.125, 3 - value, value)


def _dominating(position: _FloatArray, rng: np.random.Generator, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """The first feature is so large that the squares of the others are lost beside its own.

    For uint8, it spans the range while the others stay within a few units.
    """
    rows = 2.5 + position + 0.5 * rng.standard_normal(position.shape)
    rows[:, 0] *= 48.0 if dtype.kind == "u" else _cancelling_offset(dtype)
    return rows


def _denormals(position: _FloatArray, rng: np.random.Generator, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Every value is below the smallest normal number: squares vanish, and some hardware flushes to zero."""
    n_bits = np.finfo(dtype).nmant
    place = (position * 2 ** (n_bits - 1)).astype(np.int64)
    mantissa = 1 + place + rng.integers(0, 2 ** (n_bits - 4), position.shape)
    # By their bits, because arithmetic gives zeros where a library has set the processor to flush them.
    size: npt.NDArray[Any] = mantissa.astype(f"u{dtype.itemsize}").view(dtype)
    return np.where(position < 0.5, -size, size)


_FLOATS = ("float32", "float64")


class _Kind(NamedTuple):
    make: Callable[[_FloatArray, np.random.Generator, np.dtype[Any]], npt.NDArray[Any]]
    dtypes: tuple[str, ...] = (*_FLOATS, "uint8")
    adversarial: bool = True


_KINDS: dict[str, _Kind] = {
    "clusters": _Kind(_clusters, adversarial=False),
    "far": _Kind(_far),
    "far-apart": _Kind(_far_apart),
    "near-duplicates": _Kind(_near_duplicates),
    "ties": _Kind(_ties),
    "dominating": _Kind(_dominating),
    "denormals": _Kind(_denormals, dtypes=_FLOATS),
}

SYNTHETIC_KINDS: tuple[str, ...] = tuple(_KINDS)
"""Values for the option `kind` of ``load("synthetic")``; the functions in the registry say what each is."""

ADVERSARIAL_KINDS: tuple[str, ...] = tuple(name for name, kind in _KINDS.items() if kind.adversarial)
"""Those of `SYNTHETIC_KINDS` that are made to break a kernel."""


def _rounded(values: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    # From 1, because a row of zeros has no cosine.
    return np.clip(np.rint(values), 1, 255).astype(dtype) if dtype.kind == "u" else values.astype(dtype)


def _load_synthetic(
    *,
    n_train: int = 1000,
    n_test: int = 200,
    n_features: int = 32,
    n_classes: int = 10,
    dtype: str = "float32",
    seed: int = 0,
    kind: str = "clusters",
) -> Dataset:
    allowed = synthetic_dtypes(kind)
    make = _KINDS[kind].make
    try:
        # np.dtype(None) is float64, which nobody who passes None has asked for.
        dtype_name = "" if dtype is None else np.dtype(dtype).name
    except TypeError:
        dtype_name = ""
    if dtype_name not in allowed:
        raise InvalidInputError(f"{dtype=} does not fit kind {kind!r}; use one of {', '.join(allowed)}.")
    sizes = _integer("n_train", n_train, least=1), _integer("n_test", n_test, least=1)
    width = _integer("n_features", n_features, least=1)
    classes = _integer("n_classes", n_classes, least=1)
    native = np.dtype(dtype_name)
    # A stream for each thing that is drawn, so that none depends on how many of another there are.
    streams = np.random.SeedSequence(_integer("seed", seed, least=0)).spawn(5)
    place_rng, *split_rngs = (np.random.default_rng(stream) for stream in streams)
    places = place_rng.random((classes, width))
    n_block = max(1, _BLOCK_BYTES // (places.itemsize * width))

    def split(
        n_rows: int, label_rng: np.random.Generator, row_rng: np.random.Generator
    ) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        labels = label_rng.integers(0, classes, n_rows)
        rows = np.empty((n_rows, width), native)
        for start in range(0, n_rows, n_block):  # in blocks, because a kind works in float64
            block = slice(start, start + n_block)
            rows[block] = _rounded(make(places[labels[block]], row_rng, native), native)
        return rows, labels

    X_train, y_train = split(sizes[0], *split_rngs[:2])
    X_test, y_test = split(sizes[1], *split_rngs[2:])
    return Dataset(X_train, y_train, X_test, y_test, name="synthetic")


_LOADERS: dict[str, Callable[..., Dataset]] = {
    "digits": _load_digits,
    "mnist": _load_mnist,
    "synthetic": _load_synthetic,
}

DATASETS: tuple[str, ...] = tuple(_LOADERS)
"""The names that `load` takes."""
