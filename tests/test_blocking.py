"""Budgets of bytes are kept."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from knnbench import blocking
from knnbench.blocking import (
    BUDGET_VARIABLE,
    DEFAULT_BUDGET,
    available_memory,
    block_shape,
    check_budget,
    require_memory,
    slices,
)
from knnbench.errors import InvalidInputError, KnnbenchError, OverBudgetError

COUNTS = st.integers(1, 10**6)
COSTS = st.integers(0, 10**5)


@given(COUNTS, COUNTS, st.integers(1, 2**40), st.integers(1, 1000), COSTS, COSTS, st.integers(1, 5000), COUNTS)
def test_a_block_never_exceeds_the_budget(
    n_queries, n_corpus, budget, per_pair, per_query, per_corpus, max_queries, max_corpus
):
    costs = {"per_pair": per_pair, "per_query": per_query, "per_corpus": per_corpus}
    most = {"max_queries": max_queries, "max_corpus": max_corpus}
    if per_pair + per_query + per_corpus > budget:
        with pytest.raises(OverBudgetError, match="raise memory_budget"):
            block_shape(n_queries, n_corpus, budget=budget, **costs, **most)
        return
    queries, corpus = block_shape(n_queries, n_corpus, budget=budget, **costs, **most)
    assert 1 <= queries <= min(n_queries, max_queries)
    assert 1 <= corpus <= min(n_corpus, max_corpus)
    assert queries * corpus * per_pair + queries * per_query + corpus * per_corpus <= budget


@given(COUNTS, COUNTS, st.integers(1, 2**40), st.integers(1, 1000), COSTS, COSTS)
def test_a_block_is_not_much_smaller_than_it_must_be(n_queries, n_corpus, budget, per_pair, per_query, per_corpus):
    assume(per_pair + per_query + per_corpus <= budget)
    costs = {"per_pair": per_pair, "per_query": per_query, "per_corpus": per_corpus}
    queries, corpus = block_shape(n_queries, n_corpus, budget=budget, **costs)
    if queries == min(n_queries, 1024) and corpus == min(n_corpus, 4096):
        return
    # Twice as many of both would not have fitted.
    assert 4 * queries * corpus * per_pair + 2 * queries * per_query + 2 * corpus * per_corpus > budget


@given(st.integers(1, 2**31), st.integers(1, 2**31))
def test_a_larger_budget_never_gives_fewer_pairs(low, high):
    low, high = sorted((low, high))
    shapes = [block_shape(10_000, 60_000, budget=b, per_pair=8) for b in (low, high) if b >= 8]
    pairs = [queries * corpus for queries, corpus in shapes]
    assert pairs == sorted(pairs)


def test_over_budget_says_what_is_needed():
    with pytest.raises(OverBudgetError, match=r"the 99 bytes .* needs 1,100; .*KNNBENCH_MEMORY_BUDGET") as caught:
        block_shape(10, 10, budget=99, per_pair=100, per_query=1000)
    assert isinstance(caught.value, MemoryError)
    assert isinstance(caught.value, KnnbenchError)


@pytest.mark.parametrize("budget", [1, 10**6, 1 << 50, np.int64(5), np.uint8(7)])
def test_a_budget_given(budget):
    assert check_budget(budget) == int(budget)
    assert type(check_budget(budget)) is int


@pytest.mark.parametrize("budget", [0, -1, 1.5, 1e9, "x", "", "1.5", True, np.float32(3), [1], object()])
def test_a_budget_refused(budget):
    with pytest.raises(InvalidInputError, match=r"memory_budget is .*positive whole number of bytes"):
        check_budget(budget)


def test_the_budget_of_the_environment(monkeypatch):
    assert check_budget() == DEFAULT_BUDGET == 1 << 30
    monkeypatch.setenv(BUDGET_VARIABLE, "12345")
    assert check_budget() == 12345
    assert check_budget(99) == 99


@pytest.mark.parametrize("text", ["0", "-5", "1.5", "1e9", "many", "1 GiB"])
def test_a_budget_of_the_environment_refused(text, monkeypatch):
    monkeypatch.setenv(BUDGET_VARIABLE, text)
    with pytest.raises(InvalidInputError, match=r"\$KNNBENCH_MEMORY_BUDGET is "):
        check_budget()
    assert check_budget(1) == 1


@given(st.integers(1, 5000), st.integers(1, 6000))
def test_slices_cover_everything_once(n, step):
    parts = list(slices(n, step))
    assert [i for part in parts for i in range(part.start, part.stop)] == list(range(n))
    assert all(0 < part.stop - part.start <= step for part in parts)


def test_available_memory_is_a_number_of_bytes():
    left = available_memory()
    assert left is None or 1 << 20 < left < 1 << 60


def test_memory_is_required(monkeypatch):
    monkeypatch.setattr(blocking, "available_memory", lambda: 1000)
    require_memory(1000, "a thing")
    with pytest.raises(OverBudgetError, match=r"a thing needs .* GB and .* are available; use knn"):
        require_memory(1001, "a thing")
    monkeypatch.setattr(blocking, "available_memory", lambda: None)
    require_memory(1 << 60, "a thing")


# Of the 1000 bytes in use, 500 are pages of files that nobody uses.
GROUP = {"memory.max": "3000\n", "memory.current": "1000\n", "memory.stat": "anon 500\ninactive_file 500\n"}


def test_memory_that_cannot_be_told_is_none(monkeypatch):
    class Nowhere:
        def __init__(self, path):
            pass

        def read_text(self):
            raise FileNotFoundError("not Linux")

    monkeypatch.setattr(blocking, "Path", Nowhere)
    assert available_memory() is None


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    4 kB\n"}, 4096),
        ({"/proc/meminfo": "MemAvailable: 4 kB\n", "memory.max": "max\n", "memory.current": "1"}, 4096),
        ({"/proc/meminfo": "MemAvailable: 4 kB\n", **GROUP}, 2500),
        ({"/proc/meminfo": "MemAvailable: 1 kB\n", **GROUP}, 1024),
    ],
)
def test_available_memory_is_the_least_of_both(files, expected, monkeypatch):
    class Fake:
        def __init__(self, path):
            self.path = str(path)

        def __truediv__(self, name):
            return Fake(f"{self.path}/{name}")

        def __str__(self):
            return self.path

        def read_text(self):
            for name, text in files.items():
                if self.path.endswith(name):
                    return text
            raise FileNotFoundError(self.path)

    monkeypatch.setattr(blocking, "Path", Fake)
    assert available_memory() == expected
