"""What a report shows of records: panels of backends that were measured side by side, and a summary of each cell.

A panel is one case in one run on one machine, because only there backends took turns, so that their ratios hold. A
summary keeps the median and its interval, never the samples.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from knnbench.datasets import ADVERSARIAL_KINDS
from knnbench.errors import InvalidInputError
from knnbench.measure.comparison import commit_name, indistinguishable, machine_name, noise
from knnbench.results import RANDOM_SEARCH, Record

__all__ = ["Panel", "Summary", "current_panels", "default_baseline", "panels_of", "titles_of"]

# Ratios are against the first of these that was measured.
BASELINES = ("numpy", "sklearn", "scipy", "faiss", "python")

ITEM_BYTES = {"uint8": 1, "int8": 1, "float16": 2, "float32": 4, "float64": 8}


@dataclass(frozen=True, slots=True)
class Summary:
    """One backend on one case in one run, as it is shown.

    Attributes
    ----------
    backend, status, reason : str
    peer, complete : bool
    rank : int or None
        From 1 on, by time, of those that are ok; None for others.
    is_fastest : bool
        Whether it is the fastest or cannot be told from it.
    query_s, low_s, high_s : float or None
        Median seconds for a query against the whole corpus, and its interval.
    queries_per_s : float or None
        1 / `query_s`.
    n_samples : int
        Timed calls.
    measured_queries, measured_corpus : int
        Rows in each of them.
    error, recall : float or None
    limit_share : float or None
        The least time that the machine allows, divided by the time taken.
    bound : str
        Of the ceilings, the one that says so.
    rate : float or None
        Features of pairs a second.
    intensity : float
        Features of pairs for each byte of the queries, the corpus and the answer, each moved once.
    limit_rate, memory_rate : float or None
        Features of pairs a second that `bound` allows; bytes a second that memory gives.
    import_s, prepare_s, first_call_s, copy_in_s, call_s, compute_s, copy_out_s : float or None
        Medians of the phases.
    peak_bytes, peak_device_bytes : int or None
    contention : float or None
    library : str
        Version.
    """

    backend: str
    status: str
    reason: str
    peer: bool
    complete: bool
    rank: int | None
    is_fastest: bool
    query_s: float | None
    low_s: float | None
    high_s: float | None
    queries_per_s: float | None
    n_samples: int
    measured_queries: int
    measured_corpus: int
    error: float | None
    recall: float | None
    limit_share: float | None
    bound: str
    rate: float | None
    intensity: float | None
    limit_rate: float | None
    memory_rate: float | None
    import_s: float | None
    prepare_s: float | None
    first_call_s: float | None
    copy_in_s: float | None
    call_s: float | None
    compute_s: float | None
    copy_out_s: float | None
    peak_bytes: int | None
    peak_device_bytes: int | None
    contention: float | None
    library: str

    @classmethod
    def names(cls) -> list[str]:
        """Return the names of the fields."""
        return [entry.name for entry in fields(cls)]


@dataclass(frozen=True, slots=True)
class Panel:
    """The backends on one case in one run on one machine, the fastest first.

    Attributes
    ----------
    op, metric, dataset, dtype : str
    k : int or None
    n_queries, n_corpus, n_features, threads : int
    machine, commit, version, run, started : str
    is_adversarial : bool
        Whether the data are made to be hard to compute with.
    noise : float or None
        `knnbench.measure.comparison.noise` of it.
    is_current : bool
        Whether no later run measured all of its backends, on the same case and machine with as many threads.
    facts : dict
        Of the machine.
    libraries : dict of str to str
        Versions that its processes had loaded.
    cells : list of Summary
    records : list of Record
        What they summarise: the newest of each backend, and of its twin.
    """

    op: str
    metric: str
    dataset: str
    dtype: str
    k: int | None
    n_queries: int
    n_corpus: int
    n_features: int
    threads: int
    machine: str
    commit: str
    version: str
    run: str
    started: str
    is_adversarial: bool
    noise: float | None
    is_current: bool
    facts: dict[str, Any]
    libraries: dict[str, str]
    cells: list[Summary]
    records: list[Record] = field(repr=False)

    @property
    def size(self) -> str:
        """The shape, for a reader."""
        return f"{self.n_queries:,} x {self.n_corpus:,} x {self.n_features:,}"


def panels_of(records: Iterable[Record]) -> list[Panel]:
    """Return the panels of some records, of any number of files, ordered by case, the newest run of each first.

    Raises
    ------
    InvalidInputError
        If a record is ok with times or sizes that cannot be.
    """
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault((record.case, machine_name(record), record.threads, record.run), []).append(record)
    # Newest first; of runs that began in the same second, the last in the file.
    order = sorted(enumerate(groups.items()), key=lambda item: (_started(item[1][1]), item[0]), reverse=True)
    found = []
    later: dict[tuple[Any, ...], list[set[str]]] = {}
    for _, ((case, machine, threads, _), group) in order:
        measured = {record.backend for record in group if record.times_s}
        newer = later.setdefault((case, machine, threads), [])
        found.append(_panel(group, is_current=not any(measured <= names for names in newer)))
        newer.append(measured)
    return sorted(found, key=_case_order)


def current_panels(panels: Sequence[Panel]) -> list[Panel]:
    """Return the panels that no later run has taken the place of."""
    return [panel for panel in panels if panel.is_current]


def default_baseline(panels: Iterable[Panel]) -> str:
    """Return the backend that ratios are against where none is named; empty if nothing was measured."""
    measured = {cell.backend: None for panel in panels for cell in panel.cells if cell.rank}
    return next((name for name in (*BASELINES, *measured) if name in measured), "")


def titles_of(panels: Sequence[Panel]) -> tuple[str, list[str]]:
    """Return what all panels share, and of each what tells it from the others; no two are the same."""
    parts: dict[str, Callable[[Panel], str]] = {
        "op": lambda panel: panel.op,
        "metric": lambda panel: panel.metric,
        "dtype": lambda panel: panel.dtype,
        "dataset": lambda panel: panel.dataset + (" (adversarial)" if panel.is_adversarial else ""),
        "size": lambda panel: panel.size,
        "k": lambda panel: f"k={panel.k}" if panel.k else "",
        "threads": lambda panel: f"{panel.threads} thread{'s' if panel.threads != 1 else ''}",
        "machine": lambda panel: panel.machine,
    }
    if not panels:
        return "", []
    shared: list[Callable[[Panel], str]] = []
    varying: list[Callable[[Panel], str]] = []
    for name, text in parts.items():
        is_shared = len({text(panel) for panel in panels}) == 1
        # A metric and a dtype are what a panel is called, alone too.
        (shared if is_shared and name not in ("metric", "dtype") else varying).append(text)
    titles = [", ".join(filter(None, (text(panel) for text in varying))) for panel in panels]
    counts = Counter(title for panel, title in zip(panels, titles, strict=True) if panel.is_current)
    titles = [
        f"{title}, {_run_name(panel)}" if counts[title] > 1 or not panel.is_current else title
        for panel, title in zip(panels, titles, strict=True)
    ]
    seen: dict[str, int] = {}
    for place, title in enumerate(titles):
        seen[title] = seen.get(title, 0) + 1
        if seen[title] > 1:
            titles[place] = f"{title} ({seen[title]})"
    names = [text(panels[0]) for text in shared]
    runs = {_run_name(panel) for panel in panels}
    return ", ".join(filter(None, [*names, *(runs if len(runs) == 1 else ())])), titles


def _run_name(panel: Panel) -> str:
    return panel.started.replace("T", " ").removesuffix("+00:00") or panel.run


def _case_order(panel: Panel) -> tuple[Any, ...]:
    sizes = panel.n_features, panel.n_corpus, panel.n_queries, panel.k or 0, panel.threads
    return panel.op, panel.dataset, panel.metric, panel.dtype, *sizes, panel.machine


def _started(group: Sequence[Record]) -> str:
    return max(record.started for record in group)


def _panel(group: list[Record], is_current: bool) -> Panel:
    # What comes later in a file is newer: a run that went on, or the same file given twice.
    cells = {record.backend: record for record in group if not record.twin}
    shown = [*cells.values(), *{record.backend: record for record in group if record.twin}.values()]
    try:
        fastest, difference = indistinguishable(shown), noise(shown)
        good = [cell for cell in cells.values() if cell.status == "ok" and cell.seconds_per_pair is not None]
    except ZeroDivisionError:
        raise InvalidInputError(f"records of {group[0].case} have times and sizes of 0.") from None
    good.sort(key=lambda cell: cell.seconds_per_pair or 0.0)
    ranks = {cell.backend: rank for rank, cell in enumerate(good, 1)}
    others = [cell for cell in cells.values() if cell.backend not in ranks]
    first = group[0]
    return Panel(
        op=first.op,
        metric=first.metric,
        dataset=first.dataset,
        dtype=first.dtype,
        k=first.k,
        n_queries=first.n_queries,
        n_corpus=first.n_corpus,
        n_features=first.n_features,
        threads=first.threads,
        machine=machine_name(first),
        commit=commit_name(first),
        version=first.version,
        run=first.run,
        started=_started(group),
        is_adversarial=first.dataset.rpartition(":")[2] in ADVERSARIAL_KINDS,
        noise=difference,
        is_current=is_current,
        facts=first.machine,
        libraries={name: str(text) for record in group for name, text in record.libraries.items()},
        cells=[_summary(cell, ranks.get(cell.backend), cell.backend in fastest) for cell in (*good, *others)],
        records=shown,
    )


def _summary(cell: Record, rank: int | None, is_fastest: bool) -> Summary:
    query_s = low_s = high_s = rate = limit_share = None
    if cell.median_s and cell.interval_s is not None and cell.pair_features:
        # From a call to a query against the whole corpus, where only a part of it was measured.
        scale = cell.n_corpus * cell.n_features / cell.pair_features
        query_s, low_s, high_s = (seconds * scale for seconds in (cell.median_s, *cell.interval_s))
        rate, limit_share = cell.pair_features / cell.median_s, cell.fraction_of_floor
    return Summary(
        backend=cell.backend,
        status=cell.status,
        reason=cell.reason,
        peer=cell.peer,
        complete=cell.complete,
        rank=rank,
        is_fastest=is_fastest,
        query_s=query_s,
        low_s=low_s,
        high_s=high_s,
        queries_per_s=1 / query_s if query_s else None,
        n_samples=len(cell.times_s),
        measured_queries=cell.measured_queries,
        measured_corpus=cell.measured_corpus,
        error=cell.error,
        recall=cell.recall,
        limit_share=limit_share,
        bound=cell.bound,
        rate=rate,
        intensity=None if rate is None else _intensity(cell),
        limit_rate=cell.pair_features / cell.floor_s if rate and cell.floor_s else None,
        memory_rate=next((cell.ceilings[name] for name in ("cuda-read", "read") if name in cell.ceilings), None),
        **{f"{name}_s": cell.phase_s(name) for name in PHASES_SHOWN},
        peak_bytes=cell.peak_bytes,
        peak_device_bytes=cell.peak_device_bytes,
        contention=cell.contention,
        library=cell.library,
    )


PHASES_SHOWN = ("import", "prepare", "first_call", "copy_in", "call", "compute", "copy_out")


def _intensity(cell: Record) -> float:
    """Return the features of pairs for each byte that must move once: queries, corpus and answer."""
    item = ITEM_BYTES.get(cell.dtype, 4)
    rows = (cell.measured_queries + cell.measured_corpus) * cell.n_features * item
    width = 4 if item < 8 else 8
    answer = {"knn": (8 + width) * (cell.k or 0), "pairwise": width * cell.measured_corpus, RANDOM_SEARCH: 8}[cell.op]
    answers = cell.measured_queries * answer
    return cell.pair_features / (rows + answers)
