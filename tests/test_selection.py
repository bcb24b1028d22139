"""Choosing a backend: candidates, costs, wisdom, the choice and its regret, with a clock that tests set."""

import importlib
import importlib.metadata
import json
import math
import multiprocessing
import warnings
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

import knnbench
from knnbench import InvalidInputError, UnknownBackendError, UnsupportedError, fastest_backend
from knnbench.backends import ENTRY_POINTS
from knnbench.backends.numpy import NumpyBackend
from knnbench.cli import app
from knnbench.selection import auto, measurement, regret, wisdom
from knnbench.selection.calibration import ALONE, QUICK, RANGES, Level, calibrate, shapes
from knnbench.selection.candidates import Constraints, errors_of, sieve
from knnbench.selection.costs import Cost, fit_terms, forecast, rates_of
from knnbench.selection.problem import Problem
from knnbench.selection.regret import Outcome, outcomes, problems, summaries
from knnbench.selection.wisdom import Sample, Wisdom, backend_version, wisdom_path
from knnbench.settings import held

MODULE = importlib.import_module("knnbench.backends")
PROBLEM = Problem("knn", 100, 1000, 16, 3, "euclidean", "float32")
SHAPE = {"n_queries": 100, "n_corpus": 1000, "n_features": 16, "k": 3}
QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Clock:
    """Seconds that only planted backends spend."""

    now = 0.0

    def __call__(self):
        return Clock.now


class Planted(NumpyBackend):
    """Takes a pair and feature's worth of planted time, and more when it is first called."""

    rate, first, proof = 1e-8, 0.0, 0.0

    def spend(self, queries, prepared, space):
        n_pairs = len(queries) * len(prepared.rows)
        Clock.now += self.rate * n_pairs * space.n_features + 1e-6 + self.first
        self.first = 0.0
        return n_pairs > 10_000  # none looks at the answer

    def knn(self, queries, prepared, k, space, budget):
        if self.spend(queries, prepared, space):
            return np.zeros((len(queries), k), space.ranked), np.zeros((len(queries), k), np.int64)
        return super().knn(queries, prepared, k, space, budget)

    def candidates(self, queries, prepared, count, space, budget):
        self.spend(queries, prepared, space)
        Clock.now += self.proof * len(queries) * count
        return super().candidates(queries, prepared, count, space, budget)

    def pairwise(self, queries, prepared, space, budget):
        if self.spend(queries, prepared, space):
            return np.zeros((len(queries), 1), space.output)
        return super().pairwise(queries, prepared, space, budget)


class Steady(Planted):
    rate = 2e-8


class Doubtful(Planted):
    """Half the time, and as much again for each candidate of an exact search as for 3,000 features of a pair."""

    rate, proof = 5e-9, 3e-5


class Starter(Planted):
    """Half the time, after a start of a second."""

    rate, first = 1e-8, 1.0


class Liar(Planted):
    """A hundred times as fast, and wrong where a 2 x 2 problem is not."""

    rate = 1e-10

    def knn(self, queries, prepared, k, space, budget):
        values, indices = super().knn(queries, prepared, k, space, budget)
        return (values * 0.9 if len(queries) > 2 else values), indices


class Flawed(Planted):
    """Right on ordinary data, and off far from the origin."""

    rate = 1e-10

    def knn(self, queries, prepared, k, space, budget):
        values, indices = super().knn(queries, prepared, k, space, budget)
        return (values * 1.2 if np.abs(queries).max() > 500 else values), indices


class Breaking(Planted):
    """Works on what is tried first, and breaks on more."""

    rate = 1e-10

    def knn(self, queries, prepared, k, space, budget):
        if len(queries) > 50:
            raise RuntimeError("planted")
        return super().knn(queries, prepared, k, space, budget)


def forget():
    for name in ("registry", "_load", "backend_status"):
        getattr(MODULE, name).cache_clear()
    backend_version.cache_clear()
    wisdom.forget()
    auto.forget_choices()
    measurement._started.clear()


@pytest.fixture(autouse=True)
def own_wisdom(monkeypatch, tmp_path):
    """Give each test an empty wisdom of its own, and a clock at zero."""
    monkeypatch.setenv("KNNBENCH_WISDOM", str(tmp_path / "wisdom"))
    Clock.now = 0.0
    forget()
    yield
    monkeypatch.undo()
    forget()


@pytest.fixture
def plant(monkeypatch):
    """Add backends as a third party's: name=class."""

    def add(**classes):
        points = [
            importlib.metadata.EntryPoint(n, f"{__name__}:{c.__name__}", ENTRY_POINTS) for n, c in classes.items()
        ]
        monkeypatch.setattr(
            importlib.metadata, "entry_points",
            lambda group="": importlib.metadata.EntryPoints(points if group == ENTRY_POINTS else ()),
        )  # fmt: skip
        forget()
        return list(classes)

    return add


def choose(candidates, **options):
    return fastest_backend(**(SHAPE | options), candidates=candidates, clock=Clock())


def proof_of(problem):
    """Return the seconds that a proof takes."""
    return 2e-3 + problem.n_queries * (problem.k + 8) * (1e-6 + 2e-8 * problem.n_features)


def samples_of(
    backend, rate, n=20, overhead=1e-5, op="knn", metric="euclidean", dtype="float32", accuracy="fast"
):  # fmt: skip
    """Return samples of a backend that takes an overhead and so much for a feature of a pair, and for a proof."""
    found = []
    for size in shapes(op, n, seed=5):
        problem = Problem(op, *size, metric, dtype, accuracy=accuracy)
        call = overhead + rate * problem.work + (proof_of(problem) if problem.is_proved else 0)
        seconds = {"call": call, "prepare": overhead, "prepared": call}
        found.append(Sample(backend, backend_version(backend), problem, seconds))
    return found


# ---- The choice


def test_the_fastest_by_measurement_is_chosen(plant):
    names = plant(steady=Steady, quick=Planted)
    choice = choose(names)
    assert choice.backend == "quick"
    assert choice.seconds["steady"] / choice.seconds["quick"] == pytest.approx(2, rel=0.05)
    assert choice.indistinguishable == ("quick",)
    assert "measured now" in choice.provenance["quick"]
    low, high = choice.intervals["quick"]
    assert low < choice.seconds["quick"] < high


def test_the_time_of_a_proof_decides_where_one_is_asked_for(plant):
    names = plant(quick=Planted, doubtful=Doubtful)
    level = Level(seconds=50.0, n_shapes=8, sample_s=1e-4, longest_s=0.02, most_work=1e8)
    for _ in calibrate(level, names, clock=Clock()):
        pass
    for effort in ("estimate", "measure"):
        assert choose(names, effort=effort).backend == "doubtful"
        choice = choose(names, effort=effort, accuracy="exact")
        assert choice.backend == "quick"
        work, candidates = PROBLEM.work, PROBLEM.n_queries * (PROBLEM.k + 8)
        assert choice.seconds["doubtful"] == pytest.approx(5e-9 * work + 3e-5 * candidates, rel=0.2)
        assert choice.seconds["quick"] == pytest.approx(1e-8 * work, rel=0.2)


def test_a_fast_liar_is_never_chosen(plant):
    names = plant(liar=Liar, steady=Steady)
    for effort in ("measure", "exhaustive", "estimate"):
        choice = choose(names, effort=effort)
        assert choice.backend == "steady"
        assert choice.passed_over["liar"].startswith("wrong: distances are off")


def test_max_error_holds_on_adversarial_data_too(plant):
    names = plant(flawed=Flawed, steady=Steady)
    assert choose(names).backend == "flawed"
    choice = choose(names, max_error=1e-3)
    assert choice.backend == "steady"
    assert "adversarial" in choice.passed_over["flawed"]


def test_a_slow_starter_loses_one_call_and_wins_a_thousand(plant):
    names = plant(starter=Starter, steady=Steady)
    wisdom.wisdom().add([s for name, rate in (("starter", 1e-8), ("steady", 2e-8)) for s in samples_of(name, rate)])
    started = replace(samples_of("starter", 1e-8)[0], start=1.0)
    wisdom.wisdom().add([started])
    once = choose(names, effort="estimate")
    assert once.backend == "steady"
    assert choose(names, effort="estimate", calls=1000).backend == "starter"
    assert 1 < once.crossover_calls < 1000
    assert "starter" in str(once)
    assert choose(names, effort="estimate", calls=once.crossover_calls).backend == "starter"
    # A start that has been paid in this process counts no more.
    choose(["starter"])
    assert choose(names, effort="estimate").backend == "starter"


def test_what_breaks_as_it_is_measured_is_passed_over(plant):
    names = plant(breaking=Breaking, steady=Steady)
    choice = choose(names)
    assert choice.backend == "steady"
    assert choice.passed_over["breaking"] == "failed as it was measured: RuntimeError: planted"


def test_among_equals_the_choice_is_stable(plant):
    names = plant(b=Planted, a=Planted)
    first = choose(names)
    assert set(first.indistinguishable) == {"a", "b"}
    assert all(choose(order).backend == choose(order).backend for order in (names, names[::-1]))
    wisdom.wisdom().add(samples_of("numpy", 1e-8) + samples_of("scipy", 1e-8 * 0.99))
    measurement._started.update((name, *PROBLEM.group) for name in ("numpy", "scipy"))
    choice = fastest_backend(**SHAPE, candidates=["scipy", "numpy"], effort="estimate", max_error=1)
    assert next(iter(choice.seconds)) == "scipy"
    assert set(choice.indistinguishable) == {"scipy", "numpy"}


def test_measuring_keeps_to_its_time(plant):
    names = plant(steady=Steady, quick=Planted)
    options = {"n_queries": 10_000, "n_corpus": 20_000, "n_features": 100}
    errors = [errors_of(name, "euclidean", "float32") for name in names]
    assert all(not error["reason"] for error in errors)
    before = Clock.now
    choice = choose(names, **options, time_budget=0.5)
    assert Clock.now - before < 1.0
    # All of it: the part that was measured stands for the whole.
    assert choice.seconds["quick"] == pytest.approx(1e-8 * 2e10, rel=0.3)


def test_estimate_measures_no_time(plant, monkeypatch):
    names = plant(quick=Planted, steady=Steady)
    for name, rate in (("quick", 1e-8), ("steady", 2e-8)):
        wisdom.wisdom().add(samples_of(name, rate))
    monkeypatch.setattr(measurement.Search, "call", lambda *_: pytest.fail("measured"))
    assert choose(names, effort="estimate").backend == "quick"


def test_impossible_constraints_list_every_reason(plant):
    names = [*plant(liar=Liar), "numpy", "faiss"]
    with pytest.raises(UnsupportedError, match=r"liar: wrong.*numpy: error .* at most 1e-30.*"):
        choose(names, max_error=1e-30)
    with pytest.raises(UnsupportedError, match=r"numpy: over the memory budget"):
        choose(["numpy"], memory_budget=64)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"op": "search"}, "op is 'search'"),
        ({"n_queries": 0}, "n_queries is 0"),
        ({"n_features": 1.5}, "n_features is 1.5"),
        ({"k": 1001}, "k=1001 exceeds n_corpus=1000"),
        ({"op": "pairwise"}, "leave k out"),
        ({"dtype": "complex64"}, "complex64"),
        ({"dtype": "nonsense"}, "dtype is 'nonsense'"),
        ({"metric": "hamming"}, "hamming"),
        ({"accuracy": "best"}, "accuracy is 'best'"),
        ({"max_error": 0}, "max_error is 0"),
        ({"max_error": math.nan}, "max_error is nan"),
        ({"calls": 0}, "calls is 0"),
        ({"data_on": "tape"}, "data_on is 'tape'"),
        ({"memory_budget": -1}, "memory_budget"),
        ({"candidates": "numpy"}, "candidates is 'numpy'"),
        ({"candidates": []}, r"candidates is \[\]"),
        ({"effort": "some"}, "effort is 'some'"),
        ({"time_budget": 0}, "time_budget is 0"),
    ],
)
def test_nonsense_is_refused(options, text):
    with pytest.raises((InvalidInputError, ValueError), match=text):
        fastest_backend(**(SHAPE | options))


def test_an_unknown_candidate_is_an_error():
    with pytest.raises(UnknownBackendError, match=r"candidate 'none'"):
        fastest_backend(**SHAPE, candidates=["none"])


def test_the_choice_shows_itself(plant):
    choice = choose(plant(quick=Planted, liar=Liar))
    text, page = str(choice), choice._repr_html_()
    assert text.startswith("quick for knn euclidean float32, 100 x 1,000 x 16, k=3\n")
    assert "liar" in text
    assert "wrong: " in text
    assert page.count("<tr>") == 3
    assert "quick ✓" in page
    hostile = replace(choice, passed_over={"<script>": "<b>"})._repr_html_()
    assert "<script>" not in hostile
    assert "<b>" not in hostile


# ---- Costs


def test_terms_are_found_again():
    samples = samples_of("numpy", 3e-10, n=20, overhead=2e-4)
    asked = [s.problem for s in samples]
    seconds = np.array([s.seconds["call"] for s in samples])
    cost = Cost("call", fit_terms("call", asked, seconds), asked, seconds)
    for size in shapes("knn", 30, seed=77):
        problem = Problem("knn", *size, "euclidean", "float32")
        found = cost.predict(problem)
        assert found.seconds == pytest.approx(2e-4 + 3e-10 * problem.work, rel=0.1)
        assert found.spread < 0.25


def test_one_odd_measurement_does_not_move_the_terms():
    samples = samples_of("numpy", 3e-10, n=20, overhead=2e-4)
    asked, seconds = [s.problem for s in samples], np.array([s.seconds["call"] for s in samples])
    seconds[10] *= 30
    terms = fit_terms("call", asked, seconds)
    exact = Cost("call", terms, asked[:10], seconds[:10])
    assert exact.predict(asked[15]).seconds == pytest.approx(seconds[15], rel=0.2)


def test_small_shapes_do_not_make_large_ones_look_free():
    asked = [Problem("knn", n, 100, 2, 1, "euclidean", "float32") for n in (1, 2, 3, 5, 8, 13, 21)]
    seconds = np.full(len(asked), 1e-4)
    large = replace(asked[0], n_queries=10_000, n_corpus=10_000, n_features=1000)
    best_rate = asked[-1].work / 1e-4
    terms = fit_terms("call", asked, seconds)
    (rate,) = rates_of("call", asked[0])
    assert terms[rate] * large.work == pytest.approx(large.work / best_rate / 4)
    assert fit_terms("call", asked[-2:], seconds[-2:])[rate] == pytest.approx(1 / best_rate)


def test_one_kind_of_computation_tells_of_another():
    samples = samples_of("numpy", 3e-10, n=20, overhead=2e-4)
    samples += samples_of("numpy", 9e-10, n=3, overhead=2e-4, metric="cityblock", dtype="uint8")
    asked, seconds = [s.problem for s in samples], np.array([s.seconds["call"] for s in samples])
    terms = fit_terms("call", asked, seconds)
    cost = Cost("call", terms, asked, seconds)
    small = replace(PROBLEM, metric="cityblock", dtype="uint8", n_queries=3)
    assert cost.predict(small).seconds == pytest.approx(2e-4 + 9e-10 * small.work, rel=0.1)
    assert cost.knows(small)
    assert not cost.knows(replace(small, metric="chebyshev"))
    # All of it took twice as long where another kind was measured.
    near = Cost("call", terms, [asked[0]], 2 * seconds[:1])
    other = replace(asked[0], metric="cityblock", dtype="uint8")
    alone = Cost("call", terms, [], np.empty(0))
    assert 1.2 < near.predict(other).seconds / alone.predict(other).seconds < 1.8


def test_a_proof_costs_what_it_took():
    fast, exact = (samples_of("numpy", 3e-10, overhead=2e-4, accuracy=accuracy) for accuracy in ("fast", "exact"))
    asked = [Problem("knn", *size, "euclidean", "float32", accuracy="exact") for size in shapes("knn", 30, seed=77)]

    def costs(samples):
        known, seconds = [s.problem for s in samples], np.array([s.seconds["call"] for s in samples])
        return Cost("call", fit_terms("call", known, seconds), known, seconds)

    with_exact, without = costs(fast + exact[::2]), costs(fast)
    for problem in asked:
        search = 2e-4 + 3e-10 * problem.work
        assert with_exact.predict(problem).seconds == pytest.approx(search + proof_of(problem), rel=0.15)
        assert with_exact.predict(replace(problem, accuracy="fast")).seconds == pytest.approx(search, rel=0.15)
    assert with_exact.knows(asked[0])
    assert not without.knows(asked[0])
    assert not with_exact.knows(replace(asked[0], dtype="float64"))


def test_predictions_are_sure_only_near_what_was_measured():
    samples = samples_of("numpy", 3e-10)
    asked, seconds = [s.problem for s in samples], np.array([s.seconds["call"] for s in samples])
    cost = Cost("call", fit_terms("call", asked, seconds), asked, seconds)
    far = Problem("knn", 10**7, 10**8, 10**5, 1, "euclidean", "float32")
    assert cost.predict(asked[0]).spread < cost.predict(far).spread


def test_a_corpus_is_prepared_where_that_pays():
    def constant(quantity, seconds):
        rates = dict.fromkeys(rates_of(quantity, PROBLEM), 0.0)
        return Cost(quantity, {"call": seconds, **rates}, [PROBLEM], np.array([seconds]))

    costs = {"call": constant("call", 2.0), "prepare": constant("prepare", 10.0), "prepared": constant("prepared", 1.0)}
    assert forecast(costs, PROBLEM, 0.0).of(1).seconds == pytest.approx(2)
    assert forecast(costs, PROBLEM, 0.0).of(5).seconds == pytest.approx(10)
    assert forecast(costs, PROBLEM, 3.0).of(100).seconds == pytest.approx(113)


# ---- Wisdom


def test_wisdom_is_kept_between_processes(plant):
    plant(quick=Planted)
    error = {"version": backend_version("quick"), "metric": "euclidean", "dtype": "float32"}
    error |= {"backend": "quick", "ordinary": 1e-9, "adversarial": 1e-8, "reason": ""}
    wisdom.wisdom().add(samples_of("quick", 1e-8), [error], fit=True)
    again = Wisdom(wisdom_path())
    group = ("quick", *PROBLEM.group)
    assert len(again.samples(group)) == 20
    assert again.error("quick", "euclidean", "float32")["adversarial"] == 1e-8
    assert set(again.own.fits) == {("quick", "knn", "host")}
    assert again.source(group) == "20 measurements here, 20 of its backend"


def test_what_was_measured_before_searches_were_told_apart_was_fast(plant):
    plant(quick=Planted)
    (sample,) = samples_of("quick", 1e-8, n=1)
    line = sample.to_dict()
    del line["accuracy"]
    assert Sample.from_dict(line) == sample


def test_exact_searches_that_were_never_measured_are_taken_for_fast_ones(plant):
    plant(quick=Planted)
    wisdom.wisdom().add(samples_of("quick", 1e-8))
    exact = replace(PROBLEM, accuracy="exact")
    fast, found = (wisdom.wisdom().costs(("quick", *problem.group))["call"] for problem in (PROBLEM, exact))
    assert found.predict(exact).seconds == pytest.approx(fast.predict(PROBLEM).seconds, rel=0.2)
    assert wisdom.wisdom().source(("quick", *exact.group)).endswith("of fast searches")
    wisdom.wisdom().add(samples_of("quick", 1e-8, accuracy="exact"))
    found = wisdom.wisdom().costs(("quick", *exact.group))["call"]
    expected = 1e-5 + 1e-8 * PROBLEM.work + proof_of(exact)
    assert found.predict(exact).seconds == pytest.approx(expected, rel=0.2)


@pytest.mark.parametrize("name", ["quick", "numba"])  # without defaults, and with
def test_what_a_proof_takes_is_not_fitted_to_one_search(plant, name):
    plant(quick=Planted)
    wisdom.wisdom().add(samples_of(name, 2e-11))
    small, large = (
        Problem("knn", *size, "euclidean", "float32", accuracy="exact")
        for size in ((10, 1000, 4, 1), (5000, 2000, 300, 50))
    )
    wisdom.wisdom().add([Sample(name, backend_version(name), small, {"call": 3.5e-4})])
    fast, found = (
        wisdom.wisdom().costs((name, *p.group))["call"].predict(p).seconds
        for p in (replace(large, accuracy="fast"), large)
    )
    assert found < 5 * fast


def test_the_last_of_equal_samples_counts(plant):
    plant(quick=Planted)
    first = samples_of("quick", 1e-8)
    wisdom.wisdom().add(first)
    wisdom.wisdom().add([replace(sample, seconds={"call": 7.0}) for sample in first[:1]])
    assert {
        s.seconds["call"] for s in Wisdom(wisdom_path()).samples(first[0].group) if s.problem == first[0].problem
    } == {7.0}


def test_stale_wisdom_is_not_believed(plant, monkeypatch):
    names = plant(quick=Planted, steady=Steady)
    lies = [replace(s, version="numpy 0.1") for s in samples_of("steady", 1e-12)]
    wisdom.wisdom().add(lies + samples_of("steady", 2e-8)[:2] + samples_of("quick", 1e-8))
    assert choose(names, effort="estimate").backend == "quick"
    assert len(wisdom.wisdom().stale) == len(lies) - 0
    result = CliRunner().invoke(app, ["wisdom", "check"])
    assert result.exit_code == 1
    assert "measured with numpy 0.1" in result.output


def test_a_backend_that_vanished_is_passed_over(plant):
    plant(quick=Planted, steady=Steady)
    wisdom.wisdom().add(samples_of("quick", 1e-8) + samples_of("steady", 2e-8))
    plant(steady=Steady)  # the other one is no longer installed
    assert choose(["steady"], effort="estimate").backend == "steady"
    assert {sample.backend for sample in wisdom.wisdom().stale} == {"quick"}
    with pytest.raises(UnknownBackendError):
        choose(["quick", "steady"], effort="estimate")


@pytest.mark.parametrize(
    "content",
    ["not json\n{}", '{"wisdom": 99, "machine": {}}\n', '{"wisdom": 1, "machine": {"cpu": "another"}}\n', "",
     "HEADER\n{\"sample\": {\"backend\": \"numpy\"}}", "HEADER\n{\"other\": 1}", "HEADER\n{\"sample\": 3}"],
)  # fmt: skip
def test_a_corrupt_or_foreign_file_is_set_aside(content):
    path = wisdom_path()
    wisdom.wisdom().add(samples_of("numpy", 1e-9)[:1])
    header = path.read_text().splitlines()[0]
    path.write_text(content.replace("HEADER", header))
    wisdom.forget()
    with pytest.warns(RuntimeWarning, match="was moved to"):
        found = wisdom.wisdom()
    assert not found.own.samples
    assert [p.read_text() for p in path.parent.glob("*.corrupt")] == [content.replace("HEADER", header)]
    found.add(samples_of("numpy", 1e-9)[:2])
    assert len(Wisdom(path).samples(("numpy", *PROBLEM.group))) == 2


def test_a_line_that_a_killed_process_left_takes_no_other_with_it():
    path = wisdom_path()
    samples = samples_of("numpy", 1e-9)
    wisdom.wisdom().add(samples[:2])
    with path.open("a") as file:
        file.write('{"sample": {"backend": "numpy", "vers')
    wisdom.forget()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wisdom.wisdom().add(samples[2:4])
        assert len(Wisdom(path).samples(("numpy", *PROBLEM.group))) == 4


def _write(offset):
    for i in range(10):
        sample = samples_of("numpy", 1e-9)[0]
        problem = replace(sample.problem, n_queries=offset + i)
        Wisdom(wisdom_path()).add([replace(sample, problem=problem)])


def test_two_processes_that_write_at_once_lose_nothing():
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=_write, args=(offset,)) for offset in (100, 200)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    found = {sample.problem.n_queries for sample in Wisdom(wisdom_path()).samples(("numpy", *PROBLEM.group))}
    assert found == {*range(100, 110), *range(200, 210)}


def test_defaults_serve_before_anything_was_measured():
    known = Wisdom(None)
    assert known.shipped_on
    for name in ("numpy", "numba", "sklearn", "faiss", "torch"):
        for metric in ("euclidean", "cityblock"):
            group = (name, "knn", metric, "float32", "host", "fast")
            assert known.costs(group)["call"].predict(PROBLEM).seconds > 0
            assert known.source(group).startswith("defaults from")
    exact = replace(PROBLEM, accuracy="exact")
    for name in ("numpy", "numba", "torch"):
        assert known.costs((name, *exact.group))["call"].knows(exact)
        assert known.source((name, *exact.group)) == f"defaults from {known.shipped_on}"


def test_a_few_measurements_scale_the_defaults():
    group = ("numpy", *PROBLEM.group)
    default = Wisdom(None).costs(group)["call"].predict(PROBLEM).seconds
    other = replace(PROBLEM, n_queries=5000, n_corpus=90_000, n_features=700)
    before = Wisdom(None).costs(group)["call"].predict(other).seconds
    wisdom.wisdom().add([Sample("numpy", backend_version("numpy"), PROBLEM, {"call": 5 * default})])
    costs = wisdom.wisdom().costs(group)["call"]
    assert costs.predict(PROBLEM).seconds == pytest.approx(5 * default, rel=0.1)
    assert costs.predict(other).seconds == pytest.approx(5 * before, rel=0.1)


# ---- Calibrating and regret


def test_calibrating_makes_estimates_true(plant):
    names = plant(quick=Planted, steady=Steady)
    level = Level(seconds=50.0, n_shapes=16, sample_s=1e-4, longest_s=0.1, most_work=1e9)
    seen = list(calibrate(level, names, clock=Clock()))
    assert seen
    assert all(0 <= progress.done <= 1 for progress in seen)
    choice = choose(names, effort="estimate", calls=10)
    assert choice.backend == "quick"
    expected = 10 * (1e-8 * PROBLEM.work + 1e-6)
    assert choice.seconds["quick"] == pytest.approx(expected, rel=0.2)
    assert wisdom.wisdom().own.fits


def test_calibrating_measures_long_searches_with_one_thread_too(plant, monkeypatch):
    monkeypatch.setenv("KNNBENCH_THREADS", "2")
    names = plant(steady=Steady)
    for _ in calibrate(replace(QUICK, seconds=5.0), names, clock=Clock()):
        pass
    searches = [sample for sample in wisdom.wisdom().fresh if sample.problem.op == "knn"]
    with held({"KNNBENCH_THREADS": "1"}):
        alone = wisdom.wisdom().fresh
    assert len(alone) == ALONE < len(searches)
    longest = sorted((sample.seconds["call"] for sample in searches), reverse=True)[:ALONE]
    assert [sample.seconds["call"] for sample in alone] == pytest.approx(longest, rel=0.01)


def test_calibrating_ends_with_its_time(plant):
    names = plant(steady=Steady)
    level = replace(QUICK, seconds=0.01)
    assert len(list(calibrate(level, names, clock=Clock()))) < 20


def test_shapes_span_the_ranges():
    found = np.array(shapes("knn", 200, seed=3))
    for column, (low, high) in zip(found.T, RANGES, strict=True):
        assert low <= column.min() < low * 3 + 3
        assert high / 3 < column.max() <= high
    assert (found[:, 3] <= found[:, 1]).all()
    assert not set(map(tuple, shapes("knn", 60, 1))) & {
        (p.n_queries, p.n_corpus, p.n_features, p.k) for p in problems(200, 0)
    }


@QUIET
def test_regret_is_that_of_the_truth(plant, monkeypatch):
    monkeypatch.setattr(regret, "_Rule", lambda search, problem, clock: search)  # whose time the clock would not show
    names = plant(quick=Planted, steady=Steady)
    for name, rate in (("quick", 1e-7), ("steady", 1e-8)):  # the estimate is wrong on purpose
        for metric in ("euclidean", "cityblock", "chebyshev", "cosine"):
            for dtype in ("float32", "float64", "uint8"):
                wisdom.wisdom().add(samples_of(name, rate, metric=metric, dtype=dtype))
    asked = [replace(problem, metric="euclidean", dtype="float32") for problem in problems(4, 0, work=1e6)]
    found = list(outcomes(asked, 0.0, clock=Clock(), candidates=names))
    assert all(outcome.chosen == {"estimate": "steady"} for outcome in found)
    rows = {row.name: row for row in summaries(found)}
    assert rows[regret.RULE].geometric_mean == pytest.approx(1)  # that of the first backend, the best
    assert rows["estimate"].geometric_mean > 1.5
    assert rows["estimate"].best_share == 0
    assert rows["oracle"].geometric_mean == pytest.approx(1)


def test_the_best_is_named_by_one_half_and_scored_by_the_other():
    times = {"a": [1.0, 2.0, 1.0, 2.0], "b": [2.0, 1.0, 2.0, 1.0]}
    outcome = Outcome(PROBLEM, {}, {}, times)
    # Two that differ by noise alone: neither is found to be twice as slow as the best.
    assert outcome.regret("a") == outcome.regret("b") == pytest.approx(0.5**0.5)
    assert Outcome(PROBLEM, {}, {}, {"a": [1.0] * 4, "b": [3.0] * 4}).regret("b") == pytest.approx(3)


# ---- auto


def test_auto_follows_what_was_measured():
    rows = np.ones((100, 16), np.float32)
    for fast, slow in (("numba", "numpy"), ("numpy", "numba")):
        wisdom.wisdom().add(samples_of(fast, 1e-10, overhead=1e-6) + samples_of(slow, 1e-7, overhead=1e-3))
        auto.forget_choices()
        assert auto.choose(PROBLEM) == (fast, {})
    assert knnbench.knn(rows, rows, 3).backend == "numpy"


def test_auto_decides_once_for_a_class_of_shapes(monkeypatch):
    problem = replace(PROBLEM, n_queries=100)
    first = auto.choose(problem)
    monkeypatch.setattr(auto, "_choose", lambda *_: pytest.fail("decided again"))
    assert auto.choose(replace(problem, n_queries=101)) == first


def test_auto_loads_nothing_that_the_program_did_not(monkeypatch):
    monkeypatch.delitem(__import__("sys").modules, "torch", raising=False)
    wisdom.wisdom().add(samples_of("torch", 1e-13, overhead=1e-9))
    assert auto.choose(PROBLEM)[0] in ("numba", "numpy")


# ---- The command line


def test_the_commands(plant):
    run = CliRunner().invoke
    shape = ["fastest", "--n-queries", "100", "--n-corpus", "1000", "--n-features", "16", "-k", "3"]
    result = run(app, [*shape, "--effort", "estimate", "--candidates", "numpy,python"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("numpy for knn euclidean float32")
    result = run(app, [*shape, "--effort", "estimate", "--candidates", "numpy", "--json"])
    assert json.loads(result.output)["backend"] == "numpy"
    assert run(app, ["wisdom", "show"]).exit_code == 0
    assert isinstance(run(app, ["wisdom", "clear"]).exception, (InvalidInputError, type(None)))
    assert isinstance(run(app, [*shape, "--candidates", "none"]).exception, UnknownBackendError)


def test_what_is_not_installed_has_its_reason():
    name = next((name for name in MODULE.registry() if not MODULE.backend_status(name).ok), None)
    if name is None:
        pytest.skip("every backend works here")
    choice = fastest_backend(**SHAPE, candidates=[name, "numpy"], effort="estimate")
    assert choice.passed_over[name].startswith("unavailable: ")
    with pytest.raises(UnsupportedError, match="unavailable: "):
        fastest_backend(**SHAPE, candidates=[name])


def test_data_on_a_device_need_a_backend_there():
    with pytest.raises(UnsupportedError, match="numpy: computes on the CPU, and the data are on a device"):
        fastest_backend(**SHAPE, candidates=["numpy"], data_on="device")


def test_exactness_is_asked_before_speed():
    exact = replace(PROBLEM, accuracy="exact")
    able, reasons = sieve(["scipy", "numpy"], replace(exact, dtype="uint8"), Constraints(None, 1 << 30))
    assert able == ["numpy"]
    assert "lacks accuracy='exact'" in reasons["scipy"]
    able, reasons = sieve(["scipy", "numpy"], exact, Constraints(1e-6, 1 << 30))
    assert able == ["numpy"]
    assert "lacks accuracy='exact' for float32" in reasons["scipy"]
