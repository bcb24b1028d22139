"""Running a plan: a process for each backend, taking turns, so that none disturbs, starves or takes down another.

The processes of all backends live side by side, and only one computes at a time. Each case is measured in
rounds: in every round every backend has a turn, in an order shuffled anew, so that whatever the machine
does meanwhile, getting warm or being shared, meets all of them, and ratios hold.
"""

import json
import random
import tempfile
from collections.abc import Generator, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

import knnbench
from knnbench.backends import registry, version_of
from knnbench.measure.cases import Case
from knnbench.measure.ceilings import PROBES, Ceilings, floor
from knnbench.measure.contention import CONTENDED
from knnbench.measure.machine import describe_machine, machine_identity, source_commit
from knnbench.measure.process import Worker, WorkerEnded
from knnbench.measure.reference import reference_distances, reference_losses
from knnbench.measure.timer import is_tight
from knnbench.measure.worker import CHECKED_ITERATIONS, CHECKED_QUERIES, SEEDS, Opening, sampled_corpus
from knnbench.results import RANDOM_SEARCH, Record
from knnbench.threads import thread_count

__all__ = ["Plan", "Update", "measure"]

# Turns that the time of a case is divided into, of which every backend has some, so that the rounds interleave.
TURNS = 5
LEAST_TURNS = 3

# Times so far from which the slowest backends get no more turns when their time is spent, and from which others
# would only make a record longer.
LEAST_TIMES = 3
MOST_TIMES = 500

# Seconds that an answer may take: so many times the time for a case, which finding its size can exceed, and more
# for starting, importing, compiling, and loading and preparing the data.
LIMIT_SHARE = 10
GRACE_S = 120.0

# How far above its ceiling a rate must be to be impossible, and how often the ceiling is measured again before: a
# virtual machine whose two CPUs share a core for some seconds shows half of it.
MARGIN = 1.25
RETRIES = 2

# What bounds a kernel that does little with each byte, and what bounds the way to a device.
MEMORY_PROBES = {"cpu": ("read",), "cuda": ("cuda-read", "copy-in", "copy-out")}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be measured.

    Attributes
    ----------
    backends : sequence of str
    cases : sequence of Case
        Each on every backend.
    case_s : float
        Seconds for the calls of each backend on each case, beyond starting and preparing.
    threads : int
    seed : int
        Of the order of cases and turns.
    twins : bool
        Whether, for each case and device, the fastest backend is measured in two processes, whose difference
        is the noise.
    """

    backends: Sequence[str]
    cases: Sequence[Case]
    case_s: float = 3.0
    threads: int = field(default_factory=thread_count)
    seed: int = 0
    twins: bool = True


@dataclass(frozen=True, slots=True)
class Update:
    """How far a run is.

    Attributes
    ----------
    running : str
        What comes next.
    done : float
        Share of the run that is over.
    records : list of Record
        What became known: cells that are complete, and cells as far as they are.
    """

    running: str
    done: float
    records: list[Record] = field(default_factory=list)


def measure(
    plan: Plan, earlier: Iterable[Record] = (), ceilings: Ceilings | None = None
) -> Generator[Update, None, None]:
    """Measure a plan.

    Parameters
    ----------
    plan : Plan
    earlier : iterable of Record
        What an interrupted run of the same plan left: complete cells are not measured again, and others go on
        from what they have. Records of another machine, version or commit, or of other threads, do not count.
    ceilings : Ceilings, optional
        That were measured before; those that are missing are measured when they are needed.

    Yields
    ------
    Update
        Before every turn. A backend that crashes or hangs gives cells that say so, and the run goes on. Closing
        the iterator ends all processes.
    """
    with tempfile.TemporaryDirectory(prefix="knnbench-") as folder:
        run = _Run(plan, list(earlier), Path(folder), ceilings or Ceilings(plan.threads))
        try:
            yield from run.measure()
        finally:
            run.close()


class _Seat:
    """The process of one backend, started when it is first asked and again after it has died."""

    def __init__(self, backend: str, threads: int, limit_s: float) -> None:
        self.backend, self.device = backend, ""
        self._threads, self._limit_s = threads, limit_s
        self._worker: Worker | None = None
        self._introduction: dict[str, Any] = {}

    def introduction(self) -> dict[str, Any]:
        """Return how the backend introduces itself, its process being there if it works."""
        if self._worker is None and self._introduction.get("status") != "absent":
            self._worker = Worker("knnbench.measure.worker", self._threads)
            self._introduction = self.ask({"backend": self.backend})
            self.device = self._introduction.get("device", "")
            if self._introduction["status"] == "absent":
                self.close()
        return self._introduction

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Return the answer to a request; of a process that ended, how."""
        assert self._worker is not None
        try:
            return self._worker.ask(request, self._limit_s)
        except WorkerEnded as ended:
            self.close()
            return {"status": ended.status, "reason": ended.reason}

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None


class _Cell:
    """One backend on one case, while it is measured."""

    def __init__(self, seat: _Seat, record: Record) -> None:
        self.seat, self.record = seat, record
        self.call_s, self.operations, self.turns = 0.0, dict[str, float](), 0

    @property
    def is_open(self) -> bool:
        """Whether further calls are wanted."""
        return not self.record.complete

    def open(self, opening: Opening) -> None:
        """Have the backend open the case; what keeps it from that completes the cell."""
        introduction = self.seat.introduction()
        if introduction["status"] != "ok":
            self._complete(introduction)
            return
        answer = self.seat.ask({"open": asdict(opening)})
        earlier = self.record.phases
        phases = {"import": [introduction["import_s"]], **answer.pop("phases", {})}
        answer["phases"] = {name: [*earlier.get(name, []), *samples] for name, samples in phases.items()}
        if "call" in earlier:
            answer["phases"]["call"] = earlier["call"]
        self.call_s, self.operations = answer.pop("call_s", 0.0), answer.pop("operations", {})
        if answer["status"] == "ok":
            self.record = replace(self.record, **answer)
        else:
            self._complete(answer)

    def take_turn(self, case_s: float) -> None:
        """Time some calls; how the process ended, if it did, completes the cell."""
        answer = self.seat.ask({"turn": case_s / TURNS})
        if answer["status"] != "ok":
            self._complete(answer)
            return
        self.turns += 1
        phases = {"call": answer.pop("times_s"), **answer.pop("phases")}
        samples = {name: [*self.record.phases.get(name, []), *seconds] for name, seconds in phases.items()}
        self.record = replace(self.record, **answer, phases={**self.record.phases, **samples})

    def has_enough(self, case_s: float) -> bool:
        """Return whether further calls would say little, or the time is spent."""
        times = self.record.times_s
        if sum(times) >= case_s or len(times) >= MOST_TIMES:
            return len(times) >= LEAST_TIMES
        return self.turns >= LEAST_TURNS and is_tight(times)

    def close(self) -> None:
        """Have the backend close the case."""
        answer = self.seat.ask({"close": {}})
        self.operations |= answer.pop("operations", {})
        self._complete(answer)

    def judge(self, ceilings: Ceilings) -> None:
        """Compare the rate with the ceilings of the machine."""
        median_s = self.record.median_s
        if self.record.status != "ok" or median_s is None:
            return
        counts = {name: count * self.record.pair_features for name, count in self.operations.items() if name in PROBES}
        floor_s, bound = floor(counts, ceilings)
        for _ in range(RETRIES):
            if floor_s is None or median_s * MARGIN >= floor_s:
                break
            ceilings.again(bound)  # it may have been measured while the machine was busy
            floor_s, bound = floor(counts, ceilings)
        self.record = replace(
            self.record,
            floor_s=floor_s,
            bound=bound,
            operations=counts if floor_s else {},
            ceilings=_rates((*counts, *MEMORY_PROBES[PROBES[bound].device]), ceilings) if floor_s else {},
        )
        if floor_s is None or median_s * MARGIN >= floor_s:
            return
        (ceiling,) = ceilings.measure([bound])
        if (ceiling.contention or 0.0) >= CONTENDED:  # then the ceiling itself is too low
            return
        reason = (
            f"a call of {median_s:.3g} s would do {counts[bound] / median_s:.3g} {bound} a second; this machine does "
            f"{counts[bound] / floor_s:.3g}, measured {1 + RETRIES} times"
        )
        self.record = replace(self.record, status="impossible", reason=reason)

    def _complete(self, answer: dict[str, Any]) -> None:
        self.record = replace(self.record, **_known(answer), complete=True)


def _rates(names: Iterable[str], ceilings: Ceilings) -> dict[str, float]:
    return {ceiling.name: ceiling.rate for ceiling in ceilings.measure(names) if ceiling.rate is not None}


def _is_of(here: dict[str, Any], record: Record) -> bool:
    """Return whether a record is of this machine, and of the sources and threads given by the names of its fields."""
    is_this_machine = machine_identity(record.machine) == machine_identity(describe_machine())
    return is_this_machine and all(getattr(record, name) == value for name, value in here.items())


def _known(answer: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in answer.items() if name in Record.__dataclass_fields__}


class _Run:
    def __init__(self, plan: Plan, earlier: list[Record], folder: Path, ceilings: Ceilings) -> None:
        self._plan, self._folder = plan, folder
        self._random = random.Random(plan.seed)
        self._seats: dict[tuple[str, bool], _Seat] = {}
        self._ceilings = ceilings
        commit, dirty = source_commit()
        started = datetime.now(UTC)
        here: dict[str, Any] = {
            "threads": plan.threads,
            "version": knnbench.__version__,
            "commit": commit,
            "dirty": dirty,
        }
        own = [record for record in earlier if _is_of(here, record)]
        self._earlier = {record.cell: record for record in own}
        first = own[0] if own else None
        self._shared: dict[str, Any] = {
            **here,
            "run": first.run if first else f"{started:%Y%m%dT%H%M%S}-{self._random.getrandbits(24):06x}",
            "started": first.started if first else started.isoformat(timespec="seconds"),
            "machine": describe_machine(),
        }

    def close(self) -> None:
        """End every process."""
        for seat in self._seats.values():
            seat.close()

    def measure(self) -> Generator[Update, None, None]:
        """Measure each case."""
        cases = self._shuffled(self._plan.cases)
        for number, case in enumerate(cases):
            for update in self._measure_case(case):
                yield replace(update, done=(number + update.done) / len(cases))

    def _shuffled(self, things: Iterable[Any]) -> list[Any]:
        shuffled = list(things)
        self._random.shuffle(shuffled)
        return shuffled

    def _measure_case(self, case: Case) -> Generator[Update, None, None]:
        """Measure one case on every backend."""
        wanted = [(name, False) for name in self._plan.backends]
        wanted += [(name, True) for name in self._twins_of_before(case)]
        missing = [key for key in wanted if not self._is_complete(case, *key)]
        if not missing:
            return
        label = f"{case.op} {case.metric} {case.dataset} {case.dtype}"
        yield Update(f"{label}: reference", 0.0)
        references = self._references(case)
        cells: list[_Cell] = []
        for number, (backend, twin) in enumerate(self._shuffled(missing)):
            yield Update(f"{label}: {backend}, preparing", 0.5 * number / len(missing))
            cells.append(self._opened(case, backend, twin, references))
        if self._plan.twins and not any(twin for _, twin in wanted):
            for fastest in self._fastest(cells):
                yield Update(f"{label}: {fastest.record.backend} again, preparing", 0.5)
                cells.append(self._opened(case, fastest.record.backend, True, references, like=fastest))
        yield Update(label, 0.5, [cell.record for cell in cells])
        yield from self._rounds(label, cells)

    def _rounds(self, label: str, cells: list[_Cell]) -> Generator[Update, None, None]:
        """Let the cells take turns until each has enough, and judge them."""
        case_s, number = self._plan.case_s, 0
        waiting = [cell for cell in cells if cell.is_open]
        while waiting:
            number += 1
            for cell in self._shuffled(waiting):
                spent = sum(min(1.0, sum(c.record.times_s) / case_s) if c.is_open else 1.0 for c in cells) / len(cells)
                yield Update(f"{label}: {cell.record.backend}, round {number}", 0.5 + 0.5 * spent)
                cell.take_turn(case_s)
            yield Update(label, 0.5 + 0.5 * spent, [cell.record for cell in waiting])
            waiting = [cell for cell in waiting if cell.is_open and not cell.has_enough(case_s)]
        measured = [cell for cell in cells if cell.is_open]
        for cell in measured:
            cell.close()
        if any(cell.operations for cell in measured):
            yield Update(f"{label}: ceilings of this machine", 1.0)
            for cell in measured:
                cell.judge(self._ceilings)
        yield Update(label, 1.0, [cell.record for cell in measured])

    def _opened(
        self, case: Case, backend: str, twin: bool, references: tuple[str, str], like: _Cell | None = None
    ) -> _Cell:
        """Return the cell of a backend, with the case opened as it was before, or as `like` has it."""
        seat = self._seats.setdefault((backend, twin), _Seat(backend, self._plan.threads, self._limit_s))
        own: dict[str, Any] = {
            "backend": backend,
            "peer": registry()[backend].peer,
            "library": version_of(backend),
            "twin": twin,
        }
        described: dict[str, Any] = {name: value for name, value in asdict(case).items() if name != "options"}
        before = self._earlier.get((case.name, backend, twin))
        cell = _Cell(seat, before or Record(**described, **own, **self._shared, status="ok", complete=False))
        known = before or (like.record if like else None)
        sizes = (known.measured_queries, known.measured_corpus) if known and known.measured_queries else None
        cell.open(Opening(case, self._plan.case_s, *references, sizes=sizes))
        return cell

    def _fastest(self, cells: list[_Cell]) -> list[_Cell]:
        """Return, for each device, the cell that takes least for a pair."""
        fastest: dict[str, _Cell] = {}
        for cell in cells:
            device = cell.seat.device
            if cell.is_open and (device not in fastest or _pair_s(cell) < _pair_s(fastest[device])):
                fastest[device] = cell
        return list(fastest.values())

    def _twins_of_before(self, case: Case) -> list[str]:
        return [backend for name, backend, twin in self._earlier if twin and name == case.name]

    def _is_complete(self, case: Case, backend: str, twin: bool) -> bool:
        before = self._earlier.get((case.name, backend, twin))
        return before is not None and before.complete

    def _references(self, case: Case) -> tuple[str, str]:
        """Return the files of `Opening`."""
        if case.op == RANDOM_SEARCH:
            return self._search_references(case)
        queries, corpus = case.load()
        paths = []
        for name, rows in (("first", queries[:CHECKED_QUERIES]), ("changed", corpus[-CHECKED_QUERIES:])):
            path = self._folder / f"{name}.npy"
            np.save(path, reference_distances(rows, corpus, case.metric))
            paths.append(str(path))
        return paths[0], paths[1]

    def _search_references(self, case: Case) -> tuple[str, str]:
        """Return the files with the losses of two seeds, by the number of samples."""
        from knnbench.classifiers.random_search import INIT_SCALE, STEP_SIZE

        scales = {"step_size": STEP_SIZE, "init_scale": INIT_SCALE}
        X, y = case.load_samples()
        paths = []
        for seed in SEEDS:
            losses = {
                n: reference_losses(X[:n], y[:n], int(y.max()) + 1, seed, CHECKED_ITERATIONS, **scales).tolist()
                for n in {len(X), sampled_corpus(len(X))}
            }
            path = self._folder / f"seed-{seed}.json"
            path.write_text(json.dumps(losses))
            paths.append(str(path))
        return paths[0], paths[1]

    @property
    def _limit_s(self) -> float:
        return LIMIT_SHARE * self._plan.case_s + GRACE_S


def _pair_s(cell: _Cell) -> float:
    return cell.call_s / (cell.record.measured_queries * cell.record.measured_corpus)
