"""Two sets of records compared cell by cell: how many times slower, how sure, and whether it matters.

A side is a file, or the records of one that a selector picks: a commit, a backend, a machine, a run. Its
records of one cell are pooled. What decides is said in `compare`; it is the same whichever side comes first.

>>> from knnbench.results import Record
>>> def record(commit, times):
...     return Record(op="knn", backend="numpy", metric="cityblock", dataset="digits", dtype="uint8", k=3,
...                   n_queries=100, n_corpus=1000, n_features=64, status="ok", phases={"call": times},
...                   measured_queries=100, measured_corpus=1000, commit=commit)
>>> before = record("aaaa", [1.00, 1.01, 1.02, 0.99, 0.98, 1.03])
>>> after = record("bbbb", [2.00, 2.01, 2.02, 1.99, 1.98, 2.03])
>>> (row,) = compare([before], [after]).regressions
>>> row.verdict, f"{row.ratio:.2f}", f"{row.p:.4f}"
('slower', '2.00', '0.0022')
"""

import functools
import math
import os
import re
import statistics
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from knnbench.errors import InvalidInputError
from knnbench.metrics import get_metric
from knnbench.results import OPS, Record, read_records

__all__ = [
    "ALPHA",
    "FIELDS",
    "MATCHED",
    "MIN_CHANGE",
    "REGRESSIONS",
    "VERDICTS",
    "Cell",
    "Comparison",
    "Row",
    "Side",
    "SideFacts",
    "commit_name",
    "compare",
    "compare_sides",
    "indistinguishable",
    "machine_name",
    "noise",
    "parse_side",
]

ALPHA = 0.01
MIN_CHANGE = 0.05

FIELDS: dict[str, str] = {
    "op": f"one of: {', '.join(OPS)}",
    "backend": "its name",
    "metric": "its name or an alias",
    "dataset": "its name",
    "dtype": "of the data",
    "k": "neighbours, or none",
    "threads": "their number",
    "version": "of knnbench",
    "commit": "how it begins; clean sources only, unless -dirty follows",
    "dirty": "true or false: whether the sources differed from the commit",
    "run": "how its name begins",
    "machine": "part of the name of its CPU or of one of its GPUs",
}
"""Every field that a selector may name, and what it is given. Letters may be of either case."""

MATCHED = ("op", "metric", "dataset", "dtype", "k", "n_queries", "n_corpus", "n_features", "backend", "threads")
"""The fields in which two records are of one cell. Never the machine, the commit or the version."""

VERDICTS: dict[str, str] = {
    "slower": "B takes longer than A",
    "faster": "B takes less long than A",
    "same": "no difference was shown that exceeds the noise and the least change of interest",
    "too few samples": "no outcome of these many samples could have shown a difference",
    "broken": "A is ok and B is not",
    "mended": "B is ok and A is not",
    "not ok": "neither is ok",
    "only in A": "B has no such cell",
    "only in B": "A has no such cell",
}
"""Every verdict, and what it means."""

REGRESSIONS = ("slower", "broken")
"""The verdicts for which a comparison fails; less accurate is the third reason, beside any verdict."""

# An error this many times the other's has grown, unless both are within so many units of rounding.
ERROR_GROWTH = 2.0
ERROR_ULPS = 4

# Fewer samples than the test needs do not tell apart what is less than this many times slower.
GROSS = 2.0

# A size this many times the other's may change what is measured: caches, and the share of what each call costs.
SIZES = 2.0

CONFIDENCE = 0.95
RESAMPLES = 2000

# Up to this n * (n + m), n <= m, the exact distribution takes a few milliseconds; above it, the normal one is good.
EXACT_WORK = 1000


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: the records that it stands for.

    Attributes
    ----------
    text : str
        As it was given.
    path : Path
        The file.
    selection : dict of str to str
        The selector, by the names of `FIELDS`; empty if the side is the whole file.
    records : list of Record
        In their order; twins and what is incomplete among them.
    noise : float or None
        `noise` of the runs that the records are from, whole: a run measures twice only the fastest backend of each
        case, which need not be the one selected.
    """

    text: str
    path: Path
    selection: dict[str, str]
    records: list[Record]
    noise: float | None

    @property
    def name(self) -> str:
        """What the side is, for a reader."""
        chosen = ", ".join(f"{field}={value}" for field, value in self.selection.items())
        return f"{chosen} of {self.path}" if chosen else str(self.path)


@dataclass(frozen=True, slots=True)
class SideFacts:
    """What the records of one side have in common.

    Attributes
    ----------
    name : str
    commits : tuple of str
        Each with ``-dirty`` if the sources differed from it; an empty one if it is not known.
    machines : tuple of str
        The CPU and the GPUs of each.
    noise : float or None
        None if it is not known.
    """

    name: str
    commits: tuple[str, ...]
    machines: tuple[str, ...]
    noise: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Cell:
    """One side's records of one cell, pooled.

    Attributes
    ----------
    status, reason : str
        Of the newest record. Only if it is ok does the cell have samples.
    samples : ndarray
        Seconds for one feature of one pair, of every ok record.
    error : float or None
        The largest of the records' errors.
    rounding : float
        An error up to which the answer is as good as any.
    sizes : tuple of (int, int)
        (queries, corpus rows) in each timed call, of each ok record.
    query_s : float or None
        Median seconds per query against the whole corpus of the case.
    """

    status: str
    reason: str
    samples: NDArray[np.float64]
    error: float | None
    rounding: float
    sizes: tuple[tuple[int, int], ...]
    query_s: float | None


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One cell on both sides.

    Attributes
    ----------
    key : dict
        The values of `MATCHED`, less what was set aside.
    verdict : str
        One of `VERDICTS`.
    accuracy : {"", "less accurate", "more accurate"}
        Beside the verdict and not one of them, so that what gained time and lost digits shows both.
    a, b : Cell or None
        None if the side has no such cell.
    change : float or None
        ln(median B / median A); None unless both have samples. Logarithms, because they only change their sign
        when the sides are swapped.
    change_low, change_high : float or None
        Its interval, at 95 % confidence; None if a side has fewer than two samples.
    p : float or None
        Probability of samples at least as far apart, if the sides did not differ.
    sizes_differ : bool
        Whether the sides were measured on sizes of which one is more than twice the other.
    """

    key: dict[str, Any]
    verdict: str
    accuracy: str
    a: Cell | None
    b: Cell | None
    change: float | None = None
    change_low: float | None = None
    change_high: float | None = None
    p: float | None = None
    sizes_differ: bool = False

    @property
    def ratio(self) -> float | None:
        """Median B / median A: above 1 if B is slower."""
        return None if self.change is None else math.exp(self.change)

    @property
    def interval(self) -> tuple[float, float] | None:
        """Interval of the ratio."""
        if self.change_low is None or self.change_high is None:
            return None
        return math.exp(self.change_low), math.exp(self.change_high)

    @property
    def is_regression(self) -> bool:
        """Whether B is worse than A: slower, broken, or less accurate."""
        return self.verdict in REGRESSIONS or self.accuracy == "less accurate"


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """Two sides, cell by cell.

    Attributes
    ----------
    rows : list of Row
        In the order of A, then what only B has.
    a, b : SideFacts
    set_aside : tuple of str
        Fields of `MATCHED` in which the sides differ on purpose.
    alpha, min_change : float
        As in `compare`.
    threshold : float
        What a change had to exceed: the least change of interest, or the noise if that is larger.
    """

    rows: list[Row]
    a: SideFacts
    b: SideFacts
    set_aside: tuple[str, ...]
    alpha: float
    min_change: float
    threshold: float

    @property
    def regressions(self) -> list[Row]:
        """The rows in which B is worse than A."""
        return [row for row in self.rows if row.is_regression]

    @property
    def geometric_mean(self) -> float | None:
        """Geometric mean of the ratios, the only mean that inverts with them; None if there are none.

        References
        ----------
        P. J. Fleming and J. J. Wallace, How not to lie with statistics: the correct way to summarize benchmark
        results, Communications of the ACM 29(3), 1986, https://doi.org/10.1145/5666.5673.
        """
        changes = [row.change for row in self.rows if row.change is not None]
        return math.exp(math.fsum(changes) / len(changes)) if changes else None

    def count(self, verdict: str) -> int:
        """Return how many rows have a verdict, or an `accuracy`, of that name."""
        return sum(verdict in (row.verdict, row.accuracy) for row in self.rows)


def parse_side(text: str, default: Path) -> Side:
    """Return the side that a text names.

    Parameters
    ----------
    text : str
        ``PATH``, ``FIELD=VALUE[,FIELD=VALUE...]`` of the default file, or ``PATH@FIELD=VALUE[,...]``; the fields are
        `FIELDS`. What is the name of a file is that file. Values may contain commas and ``@``, as names of CPUs do.
    default : Path
        The file of a selector without a path.

    Notes
    -----
    A commit names clean sources: what was measured from changed ones is not that commit. ``commit=abc-dirty`` or
    ``commit=abc,dirty=true`` selects those. Without a commit, both count unless ``dirty`` is named.

    Raises
    ------
    InvalidInputError
        If there is no such file or field, a commit fits several, or nothing is selected; the text then says what the
        file has.

    Examples
    --------
    >>> parse_side("no-such-file.jsonl", Path("results.jsonl"))
    Traceback (most recent call last):
        ...
    knnbench.errors.InvalidInputError: there is no file no-such-file.jsonl. A side is PATH, FIELD=VALUE,... or \
PATH@FIELD=VALUE,...
    """
    path, selector = _split(text, default)
    selection = _parse_selector(selector, text) if selector else {}
    if not os.path.exists(path):
        hint = f" If {text} is a commit: commit={text}" if re.fullmatch(r"[0-9a-fA-F]{4,40}(-dirty)?", text) else ""
        raise InvalidInputError(
            f"there is no file {path}. A side is PATH, FIELD=VALUE,... or PATH@FIELD=VALUE,...{hint}"
        )
    everything: list[Record] = read_records(path)
    records = everything
    if not records:
        raise InvalidInputError(f"{path} holds no records.")
    for name, value in selection.items():
        left = [record for record in records if _fits(record, name, value, selection)]
        if not left:
            among = "" if len(records) == len(everything) else " that fits the fields before it"
            raise InvalidInputError(
                f"no record of {path}{among} has {name}={value}; {name} is there: {_values(records, name)}."
            )
        records = left
    commits = {record.commit for record in records}
    if "commit" in selection and len(commits) > 1:
        raise InvalidInputError(f"commit={selection['commit']} fits several: {_values(records, 'commit')}.")
    runs = {(record.run, machine_name(record)) for record in records}
    whole = [record for record in everything if (record.run, machine_name(record)) in runs]
    return Side(text, path, selection, records, noise(whole))


def _split(text: str, default: Path) -> tuple[Path, str]:
    """Return the file and the selector of a side."""
    if os.path.isfile(text):  # unlike Path.is_file, false for what is too long for a name
        return Path(text), ""
    field, equals, _ = text.partition("=")
    if equals and field in FIELDS:
        return default, text
    with_path = re.fullmatch(r"(.+?)@(\w+=.*)", text, re.DOTALL)
    if with_path:
        return Path(with_path[1]), with_path[2]
    return (default, text) if equals and re.fullmatch(r"\w+", field) else (Path(text), "")


def _parse_selector(selector: str, text: str) -> dict[str, str]:
    selection: dict[str, str] = {}
    for part in re.split(r",(?=\s*\w+=)", selector):
        field, _, value = (piece.strip() for piece in part.partition("="))
        if field not in FIELDS:
            raise InvalidInputError(f"{text!r} names the field {field!r}; expected some of: {', '.join(FIELDS)}.")
        if field in selection or not value:
            trouble = "names it twice" if field in selection else "gives it no value"
            raise InvalidInputError(
                f"{text!r} has the field {field!r} but {trouble}; expected FIELD=VALUE,... once each."
            )
        selection[field] = get_metric(value.lower()).name if field == "metric" else value
    commit = selection.get("commit", "0")
    if not re.fullmatch(r"[0-9a-f]+(-dirty)?", commit.lower()):
        raise InvalidInputError(f"commit is {commit!r}; expected hexadecimal digits, as git rev-parse prints them.")
    return selection


def _fits(record: Record, field: str, value: str, selection: dict[str, str]) -> bool:
    """Whether a record has the value in the field; `selection` says whether changed sources count for a commit."""
    value = value.lower()
    if field == "commit":
        wanted, own = value.removesuffix("-dirty"), record.commit.lower()
        # Records keep a short name: one that was copied from git log in full must find them too.
        named = bool(own) and (own.startswith(wanted) or wanted.startswith(own))
        return named and (record.dirty == value.endswith("-dirty") or (value == wanted and "dirty" in selection))
    if field == "run":
        return record.run.lower().startswith(value)
    if field == "machine":
        return any(value in name.lower() for name in _devices(record))
    return str(getattr(record, field)).lower() == value


def _values(records: Iterable[Record], field: str) -> str:
    """Return the values of a field, for an error's text."""
    if field == "machine":
        values = {machine_name(record) for record in records}
    elif field == "commit":
        values = {commit_name(record) for record in records}
    else:
        values = {str(getattr(record, field)) for record in records}
    named = sorted(value or "(not known)" for value in values)
    return ", ".join(named[:12]) + (f" and {len(named) - 12} more" if len(named) > 12 else "")


def _devices(record: Record) -> list[str]:
    """Return the names of the CPU and the GPUs."""
    gpus = [str(gpu.get("name", "")) for gpu in record.machine.get("gpus") or []]
    return [name for name in (str(record.machine.get("cpu") or ""), *gpus) if name]


def machine_name(record: Record) -> str:
    """Return the names of a record's CPU and GPUs; empty if they are not known."""
    return " + ".join(_devices(record))


def commit_name(record: Record) -> str:
    """Return a record's commit, with ``-dirty`` if the sources differed from it; empty if it is not known."""
    return record.commit + "-dirty" * (record.dirty and bool(record.commit))


def noise(records: Iterable[Record]) -> float | None:
    """Return the largest relative difference between two processes that measured the same.

    Parameters
    ----------
    records : iterable of Record
        A twin and what it is the twin of (the same run, case, backend and number of threads) are a pair.

    Returns
    -------
    float or None
        The larger median divided by the smaller, less 1, of the pair where that is largest; None if there is no pair.
    """
    medians: dict[tuple[Any, ...], dict[bool, list[float]]] = {}
    for record in records:
        if record.complete and record.status == "ok" and record.times_s:
            key = record.run, record.case, record.backend, record.threads, record.commit, record.dirty
            pair = medians.setdefault((*key, machine_name(record)), {False: [], True: []})
            pair[record.twin].extend(_samples(record))
    differences = [
        abs(math.log(statistics.median(pair[True]) / statistics.median(pair[False])))
        for pair in medians.values()
        if pair[True] and pair[False]
    ]
    return math.expm1(max(differences)) if differences else None


def compare_sides(a: Side, b: Side, *, alpha: float = ALPHA, min_change: float = MIN_CHANGE) -> Comparison:
    """Compare two sides; fields to which their selectors give different values are set aside.

    So ``backend=numba`` and ``backend=numpy`` compare the two on each case. See `compare` for the rest.
    """
    set_aside = [
        field
        for field in MATCHED
        if field in a.selection and field in b.selection and a.selection[field].lower() != b.selection[field].lower()
    ]
    return compare(
        a.records,
        b.records,
        set_aside=set_aside,
        names=(a.name, b.name),
        noises=(a.noise, b.noise),
        alpha=alpha,
        min_change=min_change,
    )


def compare(
    a: Sequence[Record],
    b: Sequence[Record],
    *,
    set_aside: Collection[str] = (),
    names: tuple[str, str] = ("A", "B"),
    noises: tuple[float | None, float | None] | None = None,
    alpha: float = ALPHA,
    min_change: float = MIN_CHANGE,
) -> Comparison:
    """Compare B with A, cell by cell.

    Parameters
    ----------
    a, b : sequence of Record
        Complete records that are no twins count, those of one cell together; if the newest is not ok, the cell is
        not. Each side is of one machine.
    set_aside : collection of str
        Fields of `MATCHED` that need not agree.
    names : (str, str)
        What the sides are.
    noises : (float or None, float or None), optional
        The noise of each side, None where it is not known; default `noise` of its records.
    alpha : float
        Probability with which one cell that has not changed may be called different, before the next two
        conditions. The more cells, the likelier it is that one of them is.
    min_change : float
        The least change of interest: 0.05 is a ratio above 1.05 or below 1 / 1.05.

    Returns
    -------
    Comparison

    Raises
    ------
    InvalidInputError
        If a side is empty or mixes machines, if a record is on both sides, or if no cell is.

    Notes
    -----
    What is compared are seconds for one feature of one pair, so that the sizes measured may differ. B is ``"slower"``
    or ``"faster"`` only if all of this holds:

    - the two-sided Mann-Whitney test gives p < `alpha` [1]_;
    - the interval of the ratio of medians, by the percentile bootstrap [2]_, leaves out 1;
    - the ratio is further from 1 than `min_change` and than the `noise` of either side: samples of one process are
      not independent, so a tiny p alone says only that the two processes differed [3]_.

    It is ``"too few samples"`` if even samples that do not overlap could not give p < `alpha` [4]_, or if a side has
    a single one, which gives no interval. Swapping the sides inverts the ratios and their intervals exactly (their
    logarithms change sign) and mirrors the verdicts.

    B is ``"less accurate"`` if its error is more than twice A's and above 4 units of rounding of the dtype.

    References
    ----------
    .. [1] H. B. Mann and D. R. Whitney, On a test of whether one of two random variables is stochastically larger
       than the other, Annals of Mathematical Statistics 18(1), 1947, https://doi.org/10.1214/aoms/1177730491.
    .. [2] B. Efron and R. J. Tibshirani, An Introduction to the Bootstrap, Chapman & Hall 1993, chapter 13.
    .. [3] T. Kalibera and R. Jones, Rigorous benchmarking in reasonable time, ISMM 2013,
       https://doi.org/10.1145/2491894.2464160.
    .. [4] With n and m samples the least p is 2 / C(n + m, n). asv 0.6.6 asks that of a one-sided bound, and so
       never finds anything with 6 and 6 samples.
    """
    if not 0 < alpha < 1 or min_change < 0:
        raise InvalidInputError(
            f"alpha is {alpha} and min_change {min_change}; expected 0 < alpha < 1, min_change >= 0."
        )
    in_a, in_b = ({repr(record) for record in side} for side in (a, b))
    if in_a & in_b:
        what = "the sides are the same records" if in_a == in_b else f"{len(in_a & in_b)} records are on both sides"
        raise InvalidInputError(
            f"{what} ({names[0]}; {names[1]}): name on each what tells it from the other, as in commit=..., "
            f"backend=... or run=..."
        )
    keys = [field for field in MATCHED if field not in set_aside]
    cells_a, cells_b = _cells(a, keys, names[0]), _cells(b, keys, names[1])
    if not cells_a.keys() & cells_b.keys():
        raise InvalidInputError(_nothing_in_common(cells_a, cells_b, keys, names))
    noise_a, noise_b = noises or (noise(a), noise(b))
    facts_a, facts_b = _facts(a, names[0], noise_a), _facts(b, names[1], noise_b)
    threshold = max(noise_a or 0.0, noise_b or 0.0, min_change)
    rows = []
    for key in dict.fromkeys((*cells_a, *cells_b)):
        one, other = cells_a.get(key), cells_b.get(key)
        named = dict(zip(keys, key, strict=True))
        if one is None or other is None:
            rows.append(Row(named, "only in B" if one is None else "only in A", "", one, other))
        elif one.status != "ok" or other.status != "ok":
            verdict = "broken" if one.status == "ok" else "mended" if other.status == "ok" else "not ok"
            rows.append(Row(named, verdict, "", one, other))
        else:
            rows.append(_row(named, one, other, alpha, threshold))
    return Comparison(rows, facts_a, facts_b, tuple(f for f in MATCHED if f in set_aside), alpha, min_change, threshold)


def indistinguishable(records: Iterable[Record], *, alpha: float = ALPHA, min_change: float = MIN_CHANGE) -> set[str]:
    """Return the backends that cannot be told from the fastest one.

    Parameters
    ----------
    records : iterable of Record
        Of one case; those of one backend count together, and twins give the noise.
    alpha, min_change : float
        As in `compare`.

    Returns
    -------
    set of str
        The fastest ok backend, and each ok one that is not slower by the rule of `compare`. One with too few samples
        for that rule is told apart if its samples do not overlap with the fastest's and it takes twice as long: a
        slow backend may have had time for a single call. Empty if none is ok.
    """
    records = list(records)
    threshold = max(noise(records) or 0.0, min_change)
    groups: dict[str, list[Record]] = {}
    for record in records:
        if record.complete and not record.twin:
            groups.setdefault(record.backend, []).append(record)
    cells = {name: cell for name, group in groups.items() if (cell := _pool(group)).samples.size}
    if not cells:
        return set()
    fastest = min(cells.values(), key=lambda cell: float(np.median(cell.samples)))
    near = {name for name, cell in cells.items() if cell is fastest}
    for name, cell in cells.items():
        if cell is fastest or _are_clearly_apart(fastest, cell, alpha, threshold):
            continue
        row = _row({}, fastest, cell, alpha, threshold)
        assert row.change is not None
        apart = cell.samples.min() > fastest.samples.max() and row.change > math.log(max(GROSS, 1 + threshold))
        if row.verdict != "slower" and not (row.verdict == "too few samples" and apart):
            near.add(name)
    return near


def _are_clearly_apart(a: Cell, b: Cell, alpha: float, threshold: float) -> bool:
    """Return whether `_row` would find B slower whatever its resamples: most of the time goes into these.

    Where no sample of B is below one of A, neither is the median of any resample, so that the interval leaves out 1.
    """
    change = math.log(np.median(b.samples)) - math.log(np.median(a.samples))
    return (
        min(a.samples.size, b.samples.size) > 1
        and b.samples.min() > a.samples.max()
        and change > math.log1p(threshold)
        and _least_p(a.samples.size, b.samples.size) < alpha
    )


def _cells(records: Sequence[Record], keys: list[str], name: str) -> dict[tuple[Any, ...], Cell]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        if record.complete and not record.twin:
            groups.setdefault(tuple(getattr(record, key) for key in keys), []).append(record)
    if not groups:
        raise InvalidInputError(f"{name} has no complete record: nothing to compare.")
    machines = sorted({machine_name(record) for group in groups.values() for record in group})
    if len(machines) > 1:
        raise InvalidInputError(
            f"{name} has records of {len(machines)} machines, whose times are not one sample: "
            f"{'; '.join(machine or '(not known)' for machine in machines)}. Name one: machine=... or run=..."
        )
    return {key: _pool(group) for key, group in groups.items()}


def _pool(records: list[Record]) -> Cell:
    """Return the records of one cell as one; what comes later in the file is newer among those of one time."""
    newest = max(enumerate(records), key=lambda place: (place[1].started, place[0]))[1]
    good = [record for record in records if record.status == "ok"] if newest.status == "ok" else []
    samples = np.array([sample for record in good for sample in _samples(record)])
    errors = [record.error for record in good if record.error is not None]
    # Answers for uint8 and float16 are float32, or integers, whose error is 0.
    kinds = [np.float64 if record.dtype == "float64" else np.float32 for record in records]
    return Cell(
        status=newest.status,
        reason=newest.reason,
        samples=samples,
        error=max(errors, default=None),
        rounding=max(ERROR_ULPS * float(np.finfo(kind).eps) for kind in kinds),
        sizes=tuple((record.measured_queries, record.measured_corpus) for record in good if record.times_s),
        query_s=float(np.median(samples)) * newest.n_corpus * newest.n_features if samples.size else None,
    )


def _samples(record: Record) -> list[float]:
    """Return the seconds for one feature of one pair, of each timed call."""
    if any(not 0 < time < math.inf for time in record.times_s) or (record.times_s and record.pair_features < 1):
        raise InvalidInputError(
            f"the record of {record.backend} on {record.case}, run {record.run!r}, is ok with times {record.times_s} "
            f"on {record.pair_features} features of pairs; expected times and sizes above 0."
        )
    return [time / record.pair_features for time in record.times_s]


def _facts(records: Sequence[Record], name: str, noise_of_side: float | None) -> SideFacts:
    counted = [record for record in records if record.complete and not record.twin]
    commits = dict.fromkeys(commit_name(record) for record in counted)
    machines = dict.fromkeys(machine_name(record) for record in counted)
    return SideFacts(name, tuple(commits), tuple(machines), noise_of_side)


def _nothing_in_common(
    a: Iterable[tuple[Any, ...]], b: Iterable[tuple[Any, ...]], keys: list[str], names: tuple[str, str]
) -> str:
    differing = []
    for key, values_a, values_b in zip(keys, zip(*a, strict=True), zip(*b, strict=True), strict=True):
        if not set(values_a) & set(values_b):
            shown = [", ".join(sorted(map(str, set(values)))) for values in (values_a, values_b)]
            differing.append(f"{key} is {shown[0]} in A and {shown[1]} in B")
    selectable = [text for text in differing if text.partition(" ")[0] in FIELDS]
    advice = (
        " To compare across such a field, name it on both sides, as in threads=1 and threads=2." if selectable else ""
    )
    return f"no cell is on both sides ({names[0]}; {names[1]}): {'; '.join(differing) or 'none is alike'}.{advice}"


def _row(key: dict[str, Any], a: Cell, b: Cell, alpha: float, threshold: float) -> Row:
    """Return the row of a cell that is ok on both sides."""
    accuracy = _accuracy(a, b)
    if not min(a.samples.size, b.samples.size):
        return Row(key, "too few samples", accuracy, a, b)
    change = math.log(np.median(b.samples)) - math.log(np.median(a.samples))
    interval = _interval(a.samples, b.samples)
    p = _p_value(a.samples, b.samples)
    low, high = interval or (None, None)
    if low is None or high is None or _least_p(a.samples.size, b.samples.size) >= alpha:
        verdict = "too few samples"
    elif p < alpha and low * high > 0 and abs(change) > math.log1p(threshold):
        verdict = "slower" if change > 0 else "faster"
    else:
        verdict = "same"
    queries, corpus = ([size[axis] for size in (*a.sizes, *b.sizes)] for axis in (0, 1))
    sizes_differ = max(queries) > SIZES * min(queries) or max(corpus) > SIZES * min(corpus)
    return Row(key, verdict, accuracy, a, b, change, low, high, p, sizes_differ)


def _accuracy(a: Cell, b: Cell) -> str:
    """Return how B's error differs from A's."""
    if a.error is None or b.error is None:
        return ""
    rounding = max(a.rounding, b.rounding)
    if b.error > max(ERROR_GROWTH * a.error, rounding):
        return "less accurate"
    return "more accurate" if a.error > max(ERROR_GROWTH * b.error, rounding) else ""


def _interval(a: NDArray[np.float64], b: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the interval of ln(median b / median a), which changes only its sign if a and b are swapped."""
    from scipy.stats import bootstrap

    if min(a.size, b.size) < 2:
        return None

    def statistic(one: NDArray[Any], other: NDArray[Any], axis: int) -> Any:
        return np.log(np.median(other, axis=axis)) - np.log(np.median(one, axis=axis))

    ends = []
    # The resamples depend on which comes first. Both orders count, so that neither decides.
    for one, other in ((a, b), (b, a)):
        found = bootstrap(
            (one, other),
            statistic,
            n_resamples=RESAMPLES // 2,
            confidence_level=CONFIDENCE,
            method="percentile",
            vectorized=True,
            batch=max(1, 10**6 // (a.size + b.size)),
            rng=np.random.default_rng(0),
        ).confidence_interval
        ends.append((float(found.low), float(found.high)))
    (low, high), (low_swapped, high_swapped) = ends
    return (low - high_swapped) / 2, (high - low_swapped) / 2


def _p_value(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Return p of the two-sided Mann-Whitney test; exact, with ties too, where that takes milliseconds.

    Notes
    -----
    ``scipy.stats.mannwhitneyu`` is exact only without ties. Its normal approximation gives p = 0.012 for 5 and 5
    samples that do not overlap, so that one tie among them would hide any slow-down from alpha = 0.01.

    References
    ----------
    B. Streitberg and J. Röhmel, Exact distributions for permutation and rank tests: an introduction to some
    recently published algorithms, Statistical Software Newsletter 12(1), 1986, 10-17.
    """
    from scipy.stats import mannwhitneyu, rankdata

    few, many = sorted((a, b), key=len)
    if len(few) * (len(few) + len(many)) > EXACT_WORK:
        return float(mannwhitneyu(few, many, alternative="two-sided", method="asymptotic").pvalue)
    doubled = (2 * rankdata(np.concatenate([few, many]))).astype(np.int64)  # midranks are halves
    rank_sum = int(doubled[: len(few)].sum())
    # ways[i, s]: in how many ways i of the samples have the doubled rank sum s. Counts stay below 2**53.
    ways = np.zeros((len(few) + 1, int(np.sort(doubled)[-len(few) :].sum()) + 1), dtype=np.int64)
    ways[0, 0] = 1
    for rank in doubled:
        ways[1:, rank:] += ways[:-1, : ways.shape[1] - rank].copy()
    outcomes = ways[-1]
    tails = int(outcomes[: rank_sum + 1].sum()), int(outcomes[rank_sum:].sum())
    return min(1.0, 2 * min(tails) / math.comb(len(doubled), len(few)))


@functools.cache
def _least_p(n: int, m: int) -> float:
    """Return the p of n and m samples that do not overlap: 2 / C(n + m, n) where it is exact."""
    return _p_value(np.arange(n, dtype=np.float64), np.arange(n, n + m, dtype=np.float64))
