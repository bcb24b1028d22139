"""The record and its file: what a crash, a full disk or another version leaves is read for what it is."""

import errno
import json
import re

import pytest

from knnbench import results
from knnbench.errors import InvalidInputError
from knnbench.results import Record, append_record, read_records

FIRST = Record(
    op="knn", backend="numpy", metric="cosine", dataset="digits", dtype="uint8", k=3, n_queries=10, n_corpus=100,
    n_features=64, status="ok", measured_queries=10, measured_corpus=100, phases={"call": [0.3, 0.1, 0.2]},
    floor_s=0.05, bound="fma-float32",
)  # fmt: skip
SECOND = Record(
    op="pairwise", backend="numba", metric="cosine", dataset="digits", dtype="uint8", k=None, n_queries=10,
    n_corpus=100, n_features=64, status="crashed", reason="ü <b>[red]",
)  # fmt: skip

# As version 1 wrote it.
VERSION_1 = {
    "backend": "numba", "metric": "cityblock", "dataset": "mnist", "dtype": "uint8", "k": 3, "n_queries": 100,
    "n_corpus": 60000, "n_features": 784, "status": "ok", "reason": "", "peer": False, "sampled": True,
    "times_s": [0.2, 0.3, 0.4], "median_s": 0.3, "low_s": 0.2, "high_s": 0.4, "import_s": 1.0, "prepare_s": 0.1,
    "first_call_s": 2.0, "error": 0.0, "recall": 1.0, "n_checked": 8, "peak_bytes": 5, "threads": 2, "version": "0.1.0",
    "library": "0.66", "commit": "0123456789ab-dirty", "started": "2026-11-01T00:00:00+00:00",
    "machine": {"cpu": "x"}, "schema": 1,
}  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "records.jsonl"
    for record in (FIRST, SECOND):
        append_record(path, record)
    return path


def test_records_survive_a_file(path):
    assert read_records(path) == [FIRST, SECOND]
    assert {json.loads(line)["schema"] for line in path.read_text().splitlines()} == {results.SCHEMA_VERSION}


@pytest.mark.parametrize("cut", [1, 20, 400])
def test_a_line_cut_short_is_left_out_and_swallows_nothing(path, cut):
    path.write_bytes(path.read_bytes()[:-cut])
    expected = [FIRST, SECOND] if cut == 1 else [FIRST]
    assert read_records(path) == expected
    append_record(path, SECOND)
    assert read_records(path) == [*expected, SECOND]


def test_what_is_not_a_record_is_refused_by_line(path):
    whole = path.read_text()
    for line, reason in (("nonsense", "not JSON"), ('{"a": 1}', "'schema'"), ("[]", ""), ('{"schema": 2}', "missing")):
        path.write_text(whole + line + "\n")
        with pytest.raises(InvalidInputError, match=f"line 3 is not a knnbench record: .*{reason}"):
            read_records(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(InvalidInputError, match=r"nowhere.jsonl: No such file"):
        read_records(tmp_path / "nowhere.jsonl")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInputError, match="binary: it is not text"):
        read_records(tmp_path / "binary")


def test_a_later_schema_is_refused_and_a_later_field_is_not(path):
    data = json.loads(FIRST.to_json())
    path.write_text(json.dumps({**data, "added_later": 1}) + "\n")
    assert read_records(path) == [FIRST]
    path.write_text(json.dumps({**data, "schema": results.SCHEMA_VERSION + 1}) + "\n")
    with pytest.raises(InvalidInputError, match=r"line 1 has schema version 3; .* upgrade"):
        read_records(path)


def test_version_1_is_read(path):
    path.write_text(json.dumps(VERSION_1) + "\n")
    (record,) = read_records(path)
    assert record.case == "knn/cityblock/mnist/uint8/100x60000x784/k3"
    assert (record.measured_queries, record.measured_corpus, record.median_s) == (100, 60000, 0.3)
    assert record.phases == {"import": [1.0], "prepare": [0.1], "first_call": [2.0], "call": [0.2, 0.3, 0.4]}
    assert (record.commit, record.dirty, record.run) == ("0123456789ab", True, VERSION_1["started"])
    absent = {**VERSION_1, "status": "absent", "times_s": [], "import_s": None, "commit": ""}
    path.write_text(json.dumps(absent) + "\n")
    (record,) = read_records(path)
    assert (record.measured_queries, record.median_s, record.dirty) == (0, None, False)


def test_a_full_disk_loses_nothing_that_was_there(path, monkeypatch):
    before = path.read_bytes()

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(results.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        append_record(path, FIRST)
    assert path.read_bytes() == before


def test_what_follows_from_the_samples():
    assert (FIRST.median_s, FIRST.interval_s, FIRST.pair_features) == (0.2, (0.1, 0.3), 64_000)
    assert FIRST.queries_per_s == pytest.approx(50)
    assert FIRST.fraction_of_floor == pytest.approx(0.25)
    assert not FIRST.is_sampled
    assert (SECOND.median_s, SECOND.interval_s, SECOND.seconds_per_pair, SECOND.queries_per_s) == (None,) * 4
    assert SECOND.fraction_of_floor is None
    assert SECOND.phase_s("prepare") is None


def test_every_field_is_documented():
    documented = set(re.findall(r"^    ((?:\w+, )*\w+) : ", Record.__doc__, flags=re.MULTILINE))
    named = {name for group in documented for name in group.split(", ")}
    assert named == set(Record.__dataclass_fields__)
