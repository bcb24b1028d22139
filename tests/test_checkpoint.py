"""A search that was killed goes on from its checkpoint, and from no other file."""

import errno
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from knnbench import CheckpointError, InvalidInputError, api, checkpoint, knn, prepare
from knnbench.checkpoint import STRIDE, Checkpoint, Progress, RowDigest

from ._checks import assert_identical

K = 5
BUDGET, BLOCK_BYTES = 400_000, 16_384


@pytest.fixture
def data(rng):
    return rng.integers(0, 9, (40, 16)).astype(np.uint8), rng.integers(0, 9, (3 * STRIDE, 16)).astype(np.uint8)


@pytest.fixture(autouse=True)
def often(monkeypatch):
    """Write after each block, of which there are several."""
    monkeypatch.setattr(api, "STREAM_BYTES", BLOCK_BYTES)
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    monkeypatch.setattr(checkpoint, "TIMES_WRITING", 0)


class Killed(BaseException):
    """Stands for a kill."""


def interrupted(queries, corpus, path, after=3, **options):
    """Search until some blocks are done."""
    calls = []

    def stop(done, of):
        calls.append(done)
        if len(calls) == after:
            raise Killed

    with pytest.raises(Killed):
        knn(queries, corpus, K, checkpoint=path, progress=stop, memory_budget=BUDGET, **options)
    assert path.exists()
    return calls[-1]


def resumed(queries, corpus, path, **options):
    """Return the answer, and how many rows were done after each block."""
    calls = []
    answer = knn(
        queries, corpus, K, checkpoint=path, progress=lambda done, of: calls.append(done), memory_budget=BUDGET,
        **options,
    )  # fmt: skip
    return answer, calls


def assert_same(answer, expected):
    assert_identical(answer.distances, expected.distances)
    assert_identical(answer.indices, expected.indices)


def as_array(corpus):
    return corpus


def as_blocks(corpus):
    return [corpus[:1], corpus[1 : 2 * STRIDE + 5], corpus[2 * STRIDE + 5 :]]


def as_iterator(corpus):
    return (corpus[i : i + 999] for i in range(0, len(corpus), 999))


@pytest.mark.parametrize("kind", [as_array, as_blocks, as_iterator])
@pytest.mark.parametrize(("dtype", "accuracy"), [("uint8", "fast"), ("float32", "fast"), ("float32", "exact")])
def test_a_search_goes_on(kind, dtype, accuracy, data, tmp_path):
    queries, corpus = (array.astype(dtype) for array in data)
    path = tmp_path / "job"
    done = interrupted(queries, kind(corpus), path, backend="numba", accuracy=accuracy)
    answer, calls = resumed(queries, kind(corpus), path, accuracy=accuracy)
    assert calls[0] > done
    assert len(calls) >= 2
    assert_same(answer, knn(queries, corpus, K, backend="numba", accuracy=accuracy))
    if accuracy == "exact":
        whole = resumed(queries, kind(corpus), path, backend="numba", accuracy=accuracy)[0]
        assert answer.certificate.candidates == pytest.approx(whole.certificate.candidates)
    assert os.listdir(tmp_path) == []  # the file is there as long as the job is not done


def test_a_search_goes_on_in_other_blocks(data, tmp_path):
    queries, corpus = data
    path = tmp_path / "job"
    interrupted(queries, as_iterator(corpus), path)
    assert_same(resumed(queries, iter(as_blocks(corpus)), path)[0], knn(queries, corpus, K))
    interrupted(queries, corpus, path)
    answer = knn(queries, corpus, K, checkpoint=path, memory_budget=3 * BUDGET)
    assert_same(answer, knn(queries, corpus, K))


def test_a_search_that_was_not_stopped_leaves_nothing(data, tmp_path):
    queries, corpus = data
    assert_same(resumed(queries, corpus, tmp_path / "job")[0], knn(queries, corpus, K))
    assert os.listdir(tmp_path) == []


def test_fewer_rows_than_neighbours_so_far(data, tmp_path):
    queries, corpus = data
    blocks = [corpus[i : i + 1] for i in range(K)] + [corpus[K:]]
    interrupted(queries, blocks, tmp_path / "job", after=2)
    assert_same(resumed(queries, blocks, tmp_path / "job")[0], knn(queries, corpus, K))


def test_auto_goes_on_with_the_backend_that_began(data, tmp_path):
    queries, corpus = data
    interrupted(queries, corpus, tmp_path / "job", backend="numpy")
    assert resumed(queries, corpus, tmp_path / "job")[0].backend == "numpy"


KILLED = """
import sys, time
import numpy as np
from knnbench import api, checkpoint, knn
checkpoint.SECONDS, checkpoint.TIMES_WRITING, api.STREAM_BYTES = 0, 0, 16_384
queries, corpus = np.load(sys.argv[1]), np.load(sys.argv[2], mmap_mode="r")

def progress(done, of):
    print(done, flush=True)
    time.sleep(0.05)

answer = knn(
    queries, corpus, 5, checkpoint=sys.argv[3], memory_budget=400_000, progress=progress, accuracy=sys.argv[5]
)
print("done", flush=True)
np.savez(sys.argv[4], *answer)
"""


@pytest.mark.parametrize(("dtype", "accuracy"), [("uint8", "fast"), ("float64", "exact")])
def test_sigkill_and_resume(dtype, accuracy, data, tmp_path):
    queries, corpus = (array.astype(dtype) / 3 if dtype == "float64" else array for array in data)
    names = [str(tmp_path / name) for name in ("q.npy", "c.npy", "job", "answer.npz")]
    np.save(names[0], queries)
    np.save(names[1], corpus)
    command = [sys.executable, "-c", KILLED, *names, accuracy]
    seen = []
    for _ in range(3):  # killed again and again, each time further on
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        seen.append([int(process.stdout.readline()) for _ in range(2)])
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
    assert all(later[0] > earlier[0] for earlier, later in itertools.pairwise(seen))
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first = int(run.stdout.split()[0])
    assert first > seen[-1][0]
    expected = knn(queries, corpus, 5, accuracy=accuracy)
    with np.load(names[3]) as answer:
        assert_identical(answer["arr_0"], expected.distances)
        assert_identical(answer["arr_1"], expected.indices)
    assert not Path(names[2]).exists()


# ---- files that are not used


def refused(queries, corpus, path, *texts, **options):
    before = path.read_bytes()
    with pytest.raises(CheckpointError) as caught:
        resumed(queries, corpus, path, **options)
    for text in texts:
        assert text in str(caught.value), str(caught.value)
    assert path.read_bytes() == before  # whatever it is, it is the user's


@pytest.mark.parametrize("place", [0, 25, 60, 0.5, -40, -1])
def test_a_damaged_file(place, data, tmp_path):
    queries, corpus = data
    path = tmp_path / "job"
    interrupted(queries, corpus, path)
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    refused(queries, corpus, path, "job", "is damaged; remove it" if place else "is no checkpoint")


@pytest.mark.parametrize("size", [0, 10, 30, 500])
def test_a_file_that_was_cut(size, data, tmp_path):
    queries, corpus = data
    path = tmp_path / "job"
    interrupted(queries, corpus, path)
    path.write_bytes(path.read_bytes()[:size])
    refused(queries, corpus, path, "job", "damaged" if size > 20 else "no checkpoint")


def test_any_other_file(data, tmp_path):
    path = tmp_path / "thesis.txt"
    path.write_text("years of work\n")
    refused(*data, path, "thesis.txt", "no checkpoint", "left as it is")


def test_another_job(data, tmp_path):
    queries, corpus = data
    path = tmp_path / "job"
    interrupted(queries, corpus, path, metric="cityblock", backend="numpy")
    same = {"metric": "cityblock", "backend": "numpy"}
    refused(queries, corpus, path, "metric is 'cityblock' there and 'chebyshev' here", **same | {"metric": "chebyshev"})
    refused(queries, corpus, path, "backend is 'numpy' there and 'numba' here", **same | {"backend": "numba"})
    refused(queries[::-1], corpus, path, "queries is", **same)
    refused(queries[:-1], corpus, path, "n_queries is 40 there and 39 here", **same)
    refused(queries, corpus[:-1], path, "n_corpus is", **same)
    refused(queries.astype(np.float32), corpus, path, "dtype is 'uint8' there and 'float32' here", **same)
    refused(queries, corpus, path, "accuracy is 'fast' there and 'exact' here", accuracy="exact", **same)
    before = path.read_bytes()
    with pytest.raises(CheckpointError, match="k is 5 there and 6 here"):
        knn(queries, corpus, 6, checkpoint=path, **same)
    assert path.read_bytes() == before
    assert_same(resumed(queries, corpus, path, **same)[0], knn(queries, corpus, K, **same))


@pytest.mark.parametrize("kind", [as_array, as_iterator])
def test_another_corpus(kind, data, tmp_path):
    queries, corpus = data
    path = tmp_path / "job"
    interrupted(queries, kind(corpus), path)
    other = corpus.copy()
    other[0, 3] += 1
    with pytest.raises(CheckpointError, match="another corpus"):
        resumed(queries, kind(other), path)
    if kind is as_iterator:
        with pytest.raises(CheckpointError, match="another corpus"):
            resumed(queries, iter([corpus[1:50]]), path)
    assert_same(resumed(queries, kind(corpus), path)[0], knn(queries, corpus, K))


def test_a_digest_does_not_depend_on_blocks(rng):
    rows = rng.integers(0, 9, (2 * STRIDE + 3, 2)).astype(np.uint8)
    values = []
    for cuts in ([], [1, 2, STRIDE], [STRIDE + 1, 2 * STRIDE], [5, 2 * STRIDE + 2]):
        digest = RowDigest(rows.dtype)
        for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            digest.take(start, rows[start:stop])
        values.append(digest.value)
    assert len(set(values)) == 1
    rows[2 * STRIDE] += 1
    digest = RowDigest(rows.dtype)
    digest.take(0, rows)
    assert digest.value != values[0]


# ---- a disk that takes nothing


def test_a_place_that_cannot_be_written_is_told_before_the_search(data, tmp_path):
    for path, text in ((tmp_path / "nowhere" / "job", "No such file"), (tmp_path, "directory")):
        with pytest.raises(CheckpointError, match=text):
            knn(*data, K, checkpoint=path)


def full_disk(monkeypatch, is_full):
    fsync = os.fsync

    def fill(descriptor):
        if is_full():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(checkpoint.os, "fsync", fill)


def test_a_full_disk_is_told_and_the_search_goes_on(data, tmp_path, monkeypatch):
    queries, corpus = data
    path = tmp_path / "job"
    calls = []
    full_disk(monkeypatch, lambda: len(calls) >= 2)
    kept = []

    def progress(done, of):
        calls.append(done)
        kept.append(Checkpoint(path).header["done"])
        assert not path.with_name("job.new").exists()

    with pytest.warns(RuntimeWarning, match=r"job could not be written at row [\d,]+: No space left.* goes on"):
        answer = knn(queries, corpus, K, checkpoint=path, memory_budget=BUDGET, progress=progress)
    assert len(kept) > 3
    assert kept[2:] == [kept[1]] * len(kept[2:])  # what was written before the disk was full stays
    assert_same(answer, knn(queries, corpus, K))


def test_a_disk_that_is_full_at_the_start(data, tmp_path, monkeypatch):
    full_disk(monkeypatch, lambda: True)
    with pytest.raises(CheckpointError, match="No space left"):
        knn(*data, K, checkpoint=tmp_path / "job")
    assert os.listdir(tmp_path) == []


LIMITED = """
import resource, signal, sys
import numpy as np
from knnbench import checkpoint, knn
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
checkpoint.SECONDS = checkpoint.TIMES_WRITING = 0
rng = np.random.default_rng(0)
queries, corpus = rng.integers(0, 9, (400, 8)).astype(np.uint8), rng.integers(0, 9, (20000, 8)).astype(np.uint8)
expected = knn(queries, corpus, 5, backend="numpy")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
answer = knn(queries, corpus, 5, backend="numpy", checkpoint=sys.argv[1], memory_budget=500_000)
assert (answer.indices == expected.indices).all()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit of the size of files")
def test_a_file_that_the_system_lets_not_grow(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path / "job")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert "File too large. The search goes on" in run.stderr
    assert os.listdir(tmp_path) == []


def test_files_are_written_no_more_often_than_they_are_worth(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SECONDS", 3600.0)
    kept = Checkpoint(tmp_path / "job")
    kept.resume({"k": 1})
    for done in (1, 2):
        kept.save(Progress(done, np.zeros((1, 1)), np.zeros((1, 1), np.int64)))
    assert Checkpoint(tmp_path / "job").header["done"] == 1


def test_queries_in_blocks_have_no_checkpoint(data, tmp_path):
    queries, corpus = data
    with pytest.raises(InvalidInputError, match=r"checkpoint is given and queries come in blocks"):
        knn([queries], corpus, K, checkpoint=tmp_path / "job")


def test_a_corpus_that_is_not_read_in_blocks_has_no_checkpoint(data, tmp_path):
    queries, corpus = data
    path = tmp_path / "job"
    path.write_bytes(b"of another job")
    for accuracy in ("fast", "exact"):
        with pytest.raises(InvalidInputError, match=r"the corpus is prepared in memory; expected"):
            knn(queries, prepare(corpus, accuracy=accuracy), K, checkpoint=path)
    assert path.read_bytes() == b"of another job"
