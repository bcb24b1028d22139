"""Comparing two sets of records, on samples made up so that the right verdict is known."""

import io
import itertools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

from knnbench.errors import InvalidInputError
from knnbench.measure import comparison as module
from knnbench.measure.comparison import compare, compare_sides, indistinguishable, noise, parse_side
from knnbench.report.comparison import comparison_table, summary_line
from knnbench.results import Record, append_record

XEON = {"cpu": "Intel(R) Xeon(R) CPU @ 2.20GHz, 8 cores", "gpus": []}
EPYC = {"cpu": "AMD EPYC 7B12", "gpus": [{"name": "NVIDIA H100", "memory": "80 GB"}]}
BEFORE, AFTER = "aaaaaaaaaaaa", "bbbbbbbbbbbb"


def record(times=(1.0,), **changes):
    fields = {
        "op": "knn",
        "backend": "numpy",
        "metric": "cityblock",
        "dataset": "digits",
        "dtype": "float32",
        "k": 3,
        "n_queries": 100,
        "n_corpus": 1000,
        "n_features": 64,
        "status": "ok",
        "measured_queries": 100,
        "measured_corpus": 1000,
        "threads": 2,
        "commit": BEFORE,
        "run": "one",
        "machine": XEON,
    }
    return Record(**{**fields, "phases": {"call": [float(time) for time in times]}, **changes})


def drawn(seed, n=10, seconds=0.01, spread=0.03):
    """Draw times as they are: around a typical one, with a tail to the right."""
    return seconds * np.exp(spread * np.random.default_rng(seed).standard_normal(n))


def only_row(*sides, **settings):
    (row,) = compare(*sides, **settings).rows
    return row


def before_and_after(one, other):
    return [record(one)], [record(other, commit=AFTER)]


@pytest.fixture
def write(tmp_path):
    def call(name, *records):
        path = tmp_path / name
        for each in records:
            append_record(path, each)
        return path

    return call


# What differs, and what does not


@pytest.mark.parametrize("seed", range(20))
def test_a_planted_slow_down_is_found(seed):
    row = only_row(*before_and_after(drawn(seed), drawn(seed + 1000, seconds=0.02)))
    assert row.verdict == "slower"
    assert row.is_regression
    assert row.interval[0] < 2 < row.interval[1] or abs(row.ratio / 2 - 1) < 0.05
    assert row.interval[0] <= row.ratio <= row.interval[1]


def test_a_slow_down_is_found_with_every_number_of_samples_that_could_show_it():
    # asv never finds it with 6 and 6 samples: the bound and the test disagree there.
    for n, m in itertools.product((2, 3, 4, 5, 6, 7, 9, 25, 60), repeat=2):
        row = only_row(*before_and_after(drawn(1, n), drawn(2, m, seconds=0.02)))
        possible = 2 / math.comb(n + m, n) < 0.01
        assert row.verdict == ("slower" if possible else "too few samples"), (n, m)


def test_the_same_distribution_is_seldom_called_different():
    draws = 300
    rows = [
        # The least change of interest would hide what the test alone does.
        only_row(*before_and_after(drawn(seed), drawn(seed + draws)), min_change=0.0)
        for seed in range(draws)
    ]
    found = sum(row.verdict != "same" for row in rows)
    # As many as that happen once in a thousand times at a rate of alpha.
    assert found <= stats.binom.ppf(0.999, draws, 0.01)
    # The p-values are no constant: about one in ten is below a tenth.
    assert 15 <= sum(row.p < 0.1 for row in rows) <= 45


def test_the_interval_covers_the_ratio_about_as_often_as_it_says():
    rows = [only_row(*before_and_after(drawn(seed, 20), drawn(seed + 300, 20, seconds=0.012))) for seed in range(100)]
    covered = sum(row.interval[0] <= 1.2 <= row.interval[1] for row in rows)
    assert 88 <= covered <= 99


@pytest.mark.parametrize("seed", range(3))
def test_the_interval_is_that_of_many_resamples(seed):
    one, other = drawn(seed, 20), drawn(seed + 300, 25)
    generator = np.random.default_rng(1)
    medians = [np.median(generator.choice(times, (20_000, times.size)), axis=1) for times in (one, other)]
    expected = np.quantile(medians[1] / medians[0], (0.025, 0.975))
    np.testing.assert_allclose(only_row(*before_and_after(one, other)).interval, expected, atol=0.004)


def test_a_difference_within_the_noise_is_none():
    a, b = before_and_after(drawn(0, 200, spread=0.001), drawn(1, 200, seconds=0.0108, spread=0.001))
    found = only_row(a, b)
    assert (found.verdict, found.p < 1e-50) == ("slower", True)
    # Two processes of one backend were 12 % apart, on either side: 8 % is nothing.
    pair = [record([0.0100], metric="cosine"), record([0.0112], metric="cosine", twin=True)]
    for sides in ((a + pair, b), (a, b + pair)):
        compared = compare(*sides)
        assert compared.threshold == pytest.approx(0.12)
        assert (compared.rows[0].verdict, compared.rows[0].p < 1e-50) == ("same", True)


def test_a_change_that_is_too_small_to_care_is_none():
    a, b = before_and_after(drawn(0, 200, spread=0.001), drawn(1, 200, seconds=0.0103, spread=0.001))
    assert only_row(a, b).verdict == "same"
    assert only_row(a, b, min_change=0.02).verdict == "slower"
    assert only_row(b, a, min_change=0.02).verdict == "faster"


def test_an_interval_that_holds_1_is_no_verdict(monkeypatch):
    sides = before_and_after(drawn(0), drawn(1, seconds=0.02))
    assert only_row(*sides).verdict == "slower"
    monkeypatch.setattr(module, "_interval", lambda *samples: (-0.1, 1.0))
    assert only_row(*sides).verdict == "same"


def test_noise_is_that_of_the_worst_pair():
    pair = [record([1.0, 1.0]), record([1.02], twin=True)]
    worst = [record([1.10], backend="numba"), record([1.0], backend="numba", twin=True)]
    assert noise([record()]) is None
    assert noise([record(), record([2.0], twin=True, run="another")]) is None
    assert noise([record(), record([2.0], twin=True, complete=False)]) is None
    assert noise(pair) == pytest.approx(0.02)
    assert noise(pair + worst) == pytest.approx(0.10)
    half = record([0.51], twin=True, measured_queries=50)  # half the queries in half the time
    assert noise([pair[0], half]) == pytest.approx(0.02)


def test_constant_samples_are_compared_without_a_warning():
    assert only_row(*before_and_after([1.0] * 9, [1.0] * 9)).verdict == "same"
    row = only_row(*before_and_after([1.0] * 5, [2.0] * 5))
    assert (row.verdict, row.ratio, row.interval) == ("slower", pytest.approx(2), pytest.approx((2, 2)))
    assert row.p == pytest.approx(2 / math.comb(10, 5))
    assert only_row(*before_and_after([1.0] * 100, [1.0] * 100)).p == 1
    assert only_row(*before_and_after([1.0], [2.0])).verdict == "too few samples"
    # C(300, 1) would do for the test; a single sample has no interval.
    assert only_row(*before_and_after([1.0], np.linspace(2, 3, 299))).verdict == "too few samples"


@pytest.mark.parametrize(("n", "m"), [(5, 5), (3, 8), (8, 3), (6, 7)])
def test_p_is_scipys(n, m):
    generator = np.random.default_rng(n)
    for _ in range(5):
        a, b = generator.random(n), generator.random(m) + 0.2
        expected = stats.mannwhitneyu(a, b, method="exact").pvalue
        assert module._p_value(a, b) == pytest.approx(expected, rel=1e-12)
        tied_a, tied_b = generator.integers(0, 5, n).astype(float), generator.integers(1, 6, m).astype(float)
        permutations = stats.PermutationMethod(n_resamples=math.comb(n + m, n))
        expected = stats.mannwhitneyu(tied_a, tied_b, method=permutations).pvalue
        assert module._p_value(tied_a, tied_b) == pytest.approx(expected, rel=1e-12)
    large = generator.random(40), generator.random(50) + 0.1
    assert module._p_value(*large) == pytest.approx(stats.mannwhitneyu(*large).pvalue, rel=1e-12)


positive = st.floats(1e-6, 1e3) | st.sampled_from([0.5, 1.0, 1.01, 2.0])


@given(
    one=st.lists(positive, min_size=1, max_size=12),
    other=st.lists(positive, min_size=1, max_size=12),
    errors=st.tuples(*[st.sampled_from([None, 0.0, 1e-7, 1e-6, 1e-3])] * 2),
    statuses=st.tuples(*[st.sampled_from(["ok", "ok", "crashed"])] * 2),
)
def test_swapping_the_sides_inverts_everything(one, other, errors, statuses):
    a = [record(one, error=errors[0], status=statuses[0])]
    b = [record(other, error=errors[1], status=statuses[1], commit=AFTER)]
    there, back = only_row(a, b), only_row(b, a)
    mirror = {"slower": "faster", "broken": "mended", "less accurate": "more accurate"}
    mirror |= {value: key for key, value in mirror.items()}
    assert back.verdict == mirror.get(there.verdict, there.verdict)
    assert back.accuracy == mirror.get(there.accuracy, there.accuracy)
    assert back.p == there.p
    assert back.sizes_differ == there.sizes_differ
    if there.change is None:
        assert back.change is None
        return
    assert back.change == -there.change
    assert back.ratio == pytest.approx(1 / there.ratio, rel=1e-12)
    if there.change_low is not None:
        assert (back.change_low, back.change_high) == (-there.change_high, -there.change_low)


def test_the_geometric_mean_of_the_ratios_inverts_too():
    a = [record([1.0] * 5), record([1.0] * 5, metric="euclidean")]
    b = [record([4.0] * 5, commit=AFTER), record([1.0] * 5, metric="euclidean", commit=AFTER)]
    assert compare(a, b).geometric_mean == pytest.approx(2)
    assert compare(b, a).geometric_mean == pytest.approx(0.5)


# What counts


def test_runs_of_one_cell_are_pooled():
    few = [1.0, 1.01, 1.02]
    a = [record(few, run="one"), record(few[::-1], run="two")]
    b = [record([2.0, 2.01, 2.02], commit=AFTER)]
    assert only_row(a[:1], b).verdict == "too few samples"
    row = only_row(a, b)
    assert row.a.samples.size == 6
    assert row.verdict == "too few samples"  # 2 / C(9, 3) is 0.02
    assert only_row(a, [*b, replace(b[0], run="two")]).verdict == "slower"


def test_twins_and_what_is_incomplete_do_not_count():
    b = [record([2.0], commit=AFTER)]
    a = [
        record([1.0]),
        record([9.0], twin=True),
        record([9.0], complete=False),
        record([], status="crashed", twin=True),
    ]
    row = only_row(a, b)
    assert row.a.samples.size == 1
    assert row.a.status == "ok"
    with pytest.raises(InvalidInputError, match="A has no complete record"):
        compare(a[1:], b)


def test_samples_of_different_sizes_are_compared_for_each_pair():
    a = [record(drawn(0))]
    for queries, corpus, differ in ((50, 1000, False), (10, 1000, True), (100, 400, True), (50, 500, False)):
        share = queries * corpus / 100_000
        b = [record(drawn(1) * share, commit=AFTER, measured_queries=queries, measured_corpus=corpus)]
        row = only_row(a, b)
        assert (row.verdict, row.sizes_differ) == ("same", differ)
        assert row.b.query_s == pytest.approx(1e-4, rel=0.05)


def test_broken_and_mended():
    a = [record([1.0]), record([], status="timed-out", metric="cosine"), record([], status="absent", op="pairwise")]
    b = [
        record([], status="crashed", reason="signal 11", commit=AFTER),
        record([1.0], metric="cosine", commit=AFTER),
        record([], status="absent", op="pairwise", commit=AFTER),
    ]
    compared = compare(a, b)
    assert [row.verdict for row in compared.rows] == ["broken", "mended", "not ok"]
    assert compared.regressions == compared.rows[:1]
    assert [row.verdict for row in compare(b, a).rows] == ["mended", "broken", "not ok"]


def test_a_cell_is_what_its_newest_record_says():
    b = [record([1.0], commit=AFTER)]
    good, crashed = record([1.0], started="2026-11-02T00:00:00"), record([], status="crashed", run="two")
    older, newer = (replace(crashed, started=f"2026-11-0{day}T00:00:00") for day in (1, 3))
    assert only_row([good, newer], b).verdict == "mended"
    assert only_row([newer, good], b).verdict == "mended"
    assert only_row([good, older], b).verdict == "too few samples"
    assert only_row([good, replace(older, started=good.started)], b).verdict == "mended"  # the last line of the file
    assert only_row([replace(older, started=good.started), good], b).verdict == "too few samples"


@pytest.mark.parametrize(
    ("dtype", "one", "other", "accuracy"),
    [
        ("float32", 1e-6, 1e-5, "less accurate"),
        ("float32", 1e-5, 1e-6, "more accurate"),
        ("float32", 1e-5, 1.9e-5, ""),
        ("float32", 1e-8, 4e-7, ""),  # rounding, on both sides
        ("float16", 1e-8, 4e-7, ""),
        ("uint8", 1e-8, 4e-7, ""),
        ("float64", 1e-16, 4e-16, ""),
        ("float64", 1e-16, 4e-7, "less accurate"),
        ("uint8", 0.0, 1e-3, "less accurate"),
        ("float32", None, 1e-3, ""),
        ("float32", 1e-3, None, ""),
    ],
)
def test_digits_that_were_lost_are_a_regression(dtype, one, other, accuracy):
    a, b = record(drawn(0), error=one, dtype=dtype), record(drawn(1) / 2, error=other, dtype=dtype, commit=AFTER)
    compared = compare([a], [b])
    assert (compared.rows[0].verdict, compared.rows[0].accuracy) == ("faster", accuracy)
    assert bool(compared.regressions) == (accuracy == "less accurate")


def test_cells_of_one_side_only_are_shown_and_no_regressions():
    a = [record(), record(metric="cosine")]
    b = [record(commit=AFTER), record(metric="euclidean", commit=AFTER)]
    compared = compare(a, b)
    assert [(row.key["metric"], row.verdict) for row in compared.rows][1:] == [
        ("cosine", "only in A"),
        ("euclidean", "only in B"),
    ]
    assert compared.regressions == []


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        ([record()], [record()], "the sides are the same records"),
        ([record(), record(metric="cosine")], [record()], "1 records are on both sides"),
        ([], [record()], "A has no complete record"),
        ([record()], [record(threads=16)], "threads is 2 in A and 16 in B. .*name it on both sides"),
        ([record(), record(machine=EPYC)], [record(commit=AFTER)], "A has records of 2 machines.*AMD EPYC.*Intel"),
        ([record([0.0])], [record(commit=AFTER)], "expected times and sizes above 0"),
        ([record(measured_queries=0)], [record(commit=AFTER)], "expected times and sizes above 0"),
    ],
)
def test_what_cannot_be_compared_is_refused(a, b, text):
    with pytest.raises(InvalidInputError, match=text):
        compare(a, b)


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": 1.0}, {"min_change": -0.1}])
def test_settings_that_decide_nothing_are_refused(settings):
    with pytest.raises(InvalidInputError, match="expected 0 < alpha < 1"):
        compare([record()], [record(commit=AFTER)], **settings)


# The sides


def test_two_files(write):
    old, new = write("old.jsonl", record(drawn(0))), write("new.jsonl", record(drawn(1) * 2, run="two"))
    compared = compare_sides(parse_side(str(old), new), parse_side(str(new), old))
    assert [row.verdict for row in compared.regressions] == ["slower"]
    assert (compared.a.name, compared.b.name) == (str(old), str(new))


def test_two_commits_of_the_default_file(write):
    path = write("r.jsonl", record(drawn(0)), record(drawn(1) * 2, commit=AFTER), record(drawn(2) * 9, commit="aaab"))
    compared = compare_sides(parse_side("commit=AAAAA", path), parse_side(f"commit={AFTER}{'0' * 28}", path))
    assert [row.verdict for row in compared.rows] == ["slower"]
    assert compared.rows[0].ratio == pytest.approx(2, rel=0.1)
    assert (compared.a.commits, compared.b.commits) == ((BEFORE,), (AFTER,))


def test_two_backends_on_each_case(write):
    cells = [
        record(drawn(seed) * seconds, backend=backend, metric=metric)
        for seed, (backend, metric, seconds) in enumerate(
            [("numpy", "cityblock", 2), ("numba", "cityblock", 1), ("numpy", "cosine", 1), ("numba", "cosine", 3)]
        )
    ]
    path = write("r.jsonl", *cells, record(backend="scipy"))
    compared = compare_sides(parse_side("backend=numba", path), parse_side("backend=numpy", path))
    assert {row.key["metric"]: row.verdict for row in compared.rows} == {"cityblock": "slower", "cosine": "faster"}
    assert compared.set_aside == ("backend",)
    assert all("backend" not in row.key for row in compared.rows)
    # What both sides name alike still tells cells apart.
    assert compare_sides(
        parse_side("backend=numba,op=knn", path), parse_side("op=knn,backend=numpy", path)
    ).set_aside == ("backend",)
    # The same backend on both sides is no difference that was asked for.
    with pytest.raises(InvalidInputError, match="same records"):
        compare_sides(parse_side("backend=numba", path), parse_side("backend=NUMBA", path))


def test_the_noise_is_that_of_the_whole_run(write):
    # The fastest alone has a twin, and is on neither side.
    pair = [record([1.0], backend="numba"), record([1.5], backend="numba", twin=True)]
    other_run = [record([1.0], backend="torch", run="two"), record([3.0], backend="torch", run="two", twin=True)]
    slow = [record(drawn(0)), record(drawn(1) * 1.4, backend="scipy")]
    path = write("r.jsonl", *slow, *pair, *other_run)
    compared = compare_sides(parse_side("backend=numpy", path), parse_side("backend=scipy", path))
    assert compared.threshold == compared.a.noise == pytest.approx(0.5)
    assert compared.rows[0].verdict == "same"
    assert only_row(slow[:1], slow[1:], set_aside=["backend"]).verdict == "slower"


def test_two_machines(write):
    path = write("r.jsonl", record(drawn(0)), record(drawn(1) / 2, machine=EPYC))
    for name in ("epyc", "H100"):
        compared = compare_sides(parse_side("machine=CPU @ 2.20GHz, 8", path), parse_side(f"machine={name}", path))
        assert [row.verdict for row in compared.rows] == ["faster"]
        assert compared.b.machines == ("AMD EPYC 7B12 + NVIDIA H100",)


def test_two_numbers_of_threads_two_dtypes_and_two_values_of_k(write):
    path = write("r.jsonl", record(drawn(0)), record(drawn(1) / 2, threads=4, k=5, dtype="float64", dataset="mnist"))
    for a, b in (("threads=2", "threads=4"), ("k=3,dtype=float32", "k=5,dtype=float64")):
        sides = parse_side(a, path), parse_side(b, path)
        with pytest.raises(InvalidInputError, match=r"no cell is on both sides.*dataset is digits in A and mnist in B"):
            compare_sides(*sides)
    a, b = (parse_side(f"threads={n},k={k},dtype={t},dataset={d}", path) for n, k, t, d in
            ((2, 3, "float32", "digits"), (4, 5, "float64", "mnist")))  # fmt: skip
    assert compare_sides(a, b).rows[0].verdict == "faster"


def test_a_selector_may_name_its_file(write, tmp_path):
    path = write(
        "r@2.jsonl", record(), record(metric="euclidean", run="2026-11-24T00"), record([], op="pairwise", k=None)
    )
    nowhere = tmp_path / "nowhere"
    assert len(parse_side(str(path), nowhere).records) == 3
    assert [each.metric for each in parse_side(f"{path}@metric=L2", nowhere).records] == ["euclidean"]
    assert [each.metric for each in parse_side(f"{path}@run=2026-11, op=KNN", nowhere).records] == ["euclidean"]
    side = parse_side(f"{path}@machine=CPU @ 2.20GHz,k=none", nowhere)
    assert [each.op for each in side.records] == ["pairwise"]
    assert side.selection == {"machine": "CPU @ 2.20GHz", "k": "none"}
    assert side.name == f"machine=CPU @ 2.20GHz, k=none of {path}"


def test_a_file_whose_name_is_like_a_selector_is_that_file(write, monkeypatch, tmp_path):
    write("k=3", record())
    monkeypatch.chdir(tmp_path)
    assert str(parse_side("k=3", tmp_path / "nowhere").path) == "k=3"


def test_changed_sources_are_not_their_commit(write):
    path = write("r.jsonl", record([1.0]), record([2.0], dirty=True), record([3.0], commit=AFTER, dirty=True))

    def times(text):
        return [each.median_s for each in parse_side(text, path).records]

    assert times("commit=aaaa") == [1.0]
    assert times("commit=aaaa-dirty") == times("commit=aaaa,dirty=true") == times("dirty=TRUE,commit=aaaa") == [2.0]
    assert times("dirty=true") == [2.0, 3.0]
    assert times("backend=numpy") == [1.0, 2.0, 3.0]
    with pytest.raises(
        InvalidInputError, match="commit is there: aaaaaaaaaaaa, aaaaaaaaaaaa-dirty, bbbbbbbbbbbb-dirty"
    ):
        times("commit=bbbb")
    with pytest.raises(InvalidInputError, match="no record"):
        times("commit=bbbb-dirty,dirty=false")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("nowhere.jsonl", r"there is no file nowhere\.jsonl"),
        ("833bc10", "there is no file 833bc10.*If 833bc10 is a commit: commit=833bc10"),
        ("nowhere.jsonl@backend=numpy", r"there is no file nowhere\.jsonl"),
        ("colour=red", "names the field 'colour'; expected some of: op, backend"),
        ("{path}@colour=red", "names the field 'colour'"),
        ("backend=numpy,backend=numba", "names it twice"),
        ("backend=", "gives it no value"),
        ("commit=HEAD", "commit is 'HEAD'; expected hexadecimal digits"),
        ("commit=a", "commit=a fits several: aaaaaaaaaaaa, aaab"),
        ("commit=cc", "has commit=cc; commit is there: aaaaaaaaaaaa, aaab"),
        ("metric=nope", "metric 'nope' is unknown"),
        ("backend=cupy", r"no record of .*r\.jsonl has backend=cupy; backend is there: numba, numpy"),
        ("backend=numba,threads=2", "that fits the fields before it has threads=2; threads is there: 8"),
        ("machine=M1", "has machine=M1; machine is there: Intel"),
        ("empty.jsonl", "holds no records"),
        ("machine=" + "x" * 300, "has machine=xxx"),
    ],
)
def test_a_side_that_cannot_be_is_explained(write, tmp_path, monkeypatch, text, error):
    monkeypatch.chdir(tmp_path)
    path = write("r.jsonl", record(), record(commit="aaab", backend="numba", threads=8))
    write("empty.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InvalidInputError, match=error):
        parse_side(text.format(path=path), path)


def test_files_of_schema_version_1_are_read(tmp_path):
    def line(commit, times):
        return json.dumps(
            {"backend": "numpy", "metric": "cityblock", "dataset": "digits", "dtype": "uint8", "k": 3, "n_queries": 100,
             "n_corpus": 1438, "n_features": 64, "peer": False, "status": "ok", "reason": "", "times_s": list(times),
             "error": 0.0, "threads": 2, "commit": commit, "started": "2026-11-20T10:00:00+00:00", "machine": XEON,
             "schema": 1}
        )  # fmt: skip

    path = tmp_path / "r.jsonl"
    path.write_text("\n".join([line("aaaa", drawn(0)), line("aaaa-dirty", drawn(1) * 2)]) + "\n")
    compared = compare_sides(parse_side("commit=aaaa", path), parse_side("commit=aaaa-dirty", path))
    assert [row.verdict for row in compared.rows] == ["slower"]
    assert compared.rows[0].key["op"] == "knn"
    assert compared.b.commits == ("aaaa-dirty",)


# The backends that are as good as the fastest


def test_backends_that_cannot_be_told_from_the_fastest():
    near = [record(drawn(0), backend="numba"), record(drawn(1) * 1.01, backend="torch")]
    far = [record(drawn(2) * 1.3, backend="numpy"), record([1.0], backend="python")]
    failed = [record(drawn(3) / 9, backend="scipy", status="wrong"), record([], backend="cupy", status="absent")]
    assert indistinguishable(far + failed + near) == {"numba", "torch"}
    assert indistinguishable(failed) == indistinguishable([]) == set()
    # With too few samples, only what is clearly apart is told apart.
    assert indistinguishable([near[0], record([0.011, 0.012], backend="numpy")]) == {"numba", "numpy"}
    assert indistinguishable([near[0], record([0.001], backend="numpy")]) == {"numpy"}
    # Two processes of the same differ by 40 %: 30 % are nothing.
    twin = record(drawn(0) * 1.4, backend="numba", twin=True)
    assert indistinguishable([*near, *far, twin]) == {"numba", "torch", "numpy"}


# The table


def shown(compared, width=200, **console):
    file = io.StringIO()
    Console(file=file, width=width, **console).print(comparison_table(compared))
    return file.getvalue()


def test_the_table_says_what_what_with_and_how_sure():
    a = [record([1.0] * 8, error=1e-7), record([1.0], metric="cosine"), record([1.0], metric="euclidean")]
    b = [
        record([2.0] * 8, error=1e-3, commit=AFTER),
        record([], status="crashed", reason="signal 11", metric="cosine", commit=AFTER),
        record([0.001], metric="euclidean", measured_queries=1, commit=AFTER),
    ]
    twins = [record([1.0], run="x", metric="sqeuclidean"), record([1.03], run="x", metric="sqeuclidean", twin=True)]
    absent = [record([], status="absent", backend="cupy", commit=commit) for commit in (BEFORE, AFTER)]
    compared = compare([*a, *twins, absent[0]], [*b, absent[1]], names=("old", "new"))
    text = shown(compared)
    for part in (
        "B against A, knn, digits, float32, k=3, 100 x 1,000 x 64, numpy, 2 threads",
        "slower; less accurate (error 1.0e-07 -> 1.0e-03)",
        "broken; B is crashed (signal 11)",
        "too few samples; measured sizes differ",
        "only in A",
        "2.000 .. 2.000",
        "10 ms",
        "20 ms",
        f"A: old; commit {BEFORE}; machine Intel(R) Xeon(R) CPU @ 2.20GHz, 8 cores",
        f"B: new; commit {AFTER}",
        "p < 0.01",
        "change above 5.0%",
        "noise of A 3.0%, of B not known, no A/A pair",
        "1 slower, 0 faster, 0 same, 1 broken, 1 less accurate, 1 too few samples, 1 only in A, 1 not ok",
        "geometric mean of B / A: ",
    ):
        assert part in " ".join(text.split()) or part in text, part
    assert "cupy" not in text  # absent on both sides
    # The words say all that the colours do.
    assert "\x1b[" not in text
    assert "\x1b[31m" in shown(compared, force_terminal=True, color_system="standard")


def test_what_was_set_aside_is_no_column(write):
    path = write("r.jsonl", record(), record([2.0], backend="numba"))
    compared = compare_sides(parse_side("backend=numpy", path), parse_side("backend=numba", path))
    text = shown(compared)
    assert "A: backend=numpy of" in text
    assert "│ backend" not in text
    assert (
        summary_line(compared)
        == "geometric mean of B / A: 2.000; 0 slower, 0 faster, 0 same, 0 broken, 1 too few samples"
    )


def test_a_comparison_without_a_time_is_shown():
    a, b = record([], status="crashed"), record([], status="absent", commit=AFTER)
    compared = compare([a], [b])
    assert compared.geometric_mean is None
    assert "1 not ok" in shown(compared)


def test_names_in_a_file_cannot_act_on_the_terminal():
    hostile = "[red]x[/] [/bold] :bug: \x1b[2J\x1b]0;title\x07 \\"
    a = record(dataset=hostile, machine={"cpu": hostile}, commit=hostile)
    b = record([], status="crashed", reason=hostile, dataset=hostile)
    text = shown(compare([a], [b], names=(hostile, "[b]")), width=400)
    assert "\x1b" not in text
    assert "\x07" not in text
    assert " ".join(text.split()).count("[red]x[/] [/bold] :bug: ?[2J?]0;title? \\") == 5
