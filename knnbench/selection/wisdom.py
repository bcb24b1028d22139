"""Wisdom: what was measured on this machine, kept between processes.

A file of JSON lines for each machine, in ``$KNNBENCH_WISDOM`` or else ``wisdom`` in ``$KNNBENCH_CACHE`` or the user's
cache directory. The first line names the machine: CPU, threads, GPUs and their driver. The others are measurements
(``"sample"``), costs fitted to them (``"fit"``) and errors against a reference (``"error"``), each with the version of
the library that computed. Lines are only ever appended, in one write, so that processes that do so at once lose
nothing; the last of equal ones counts.

What was measured with another version is not believed, and what comes with the package, measured on a named machine,
serves until there is something better.
"""

import functools
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from knnbench.backends import registry, version_of
from knnbench.threads import thread_count

from .costs import ENOUGH, QUANTITIES, Cost, fit_terms, rates_of
from .problem import Problem

__all__ = ["Sample", "Wisdom", "backend_version", "forget", "machine_key", "wisdom", "wisdom_path"]

SCHEMA = 2

WISDOM_VARIABLE = "KNNBENCH_WISDOM"

# From so many measurements of a backend on, the defaults are left out. Fewer are of shapes that someone asked for, and
# say little of others.
SUFFICIENT = 18

# From so many exact searches of a dtype on, what a proof takes is fitted to them.
SUFFICIENT_PROOFS = 6

# Of a backend's measurements the last so many count: a prediction looks at all of them.
MOST_SAMPLES = 400

Group = tuple[str, ...]
"""A backend and a kind of computation: ``(backend, op, metric, dtype, data_on, accuracy)``."""

Pool = tuple[str, str, str]
"""What is fitted as one: ``(backend, op, data_on)``."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What a computation took.

    Attributes
    ----------
    backend, version : str
    problem : Problem
    seconds : dict of str to float
        By the quantity: ``"call"``, ``"prepare"``, ``"prepared"``.
    start : float
        What the first call of the process took beyond that; 0 where it was not the first.
    """

    backend: str
    version: str
    problem: Problem
    seconds: dict[str, float]
    start: float = 0.0

    @property
    def group(self) -> Group:
        """The backend and the kind of computation."""
        return self.backend, *self.problem.group

    @property
    def pool(self) -> Pool:
        """What it is fitted with."""
        return pool_of(self.group)

    def to_dict(self) -> dict[str, Any]:
        """Return what a line holds."""
        kind = {"backend": self.backend, "version": self.version, **asdict(self.problem)}
        return {**kind, **self.seconds, "start": self.start}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> "Sample":
        """Return the sample of a line; raise KeyError, TypeError or ValueError if it holds none."""
        problem = Problem(**{name: line[name] for name in Problem.__dataclass_fields__ if name in line})
        seconds = {name: float(line[name]) for name in QUANTITIES if name in line}
        if "call" not in seconds or not all(0 < value < np.inf for value in seconds.values()):
            raise ValueError(f"no seconds: {seconds}")
        return cls(str(line["backend"]), str(line["version"]), problem, seconds, float(line["start"]))


def pool_of(group: Group) -> Pool:
    """Return the pool of a group."""
    return group[0], group[1], group[4]


def as_fast(group: Group) -> Group:
    """Return the group of the fast searches of a kind."""
    return *group[:5], "fast"


@functools.cache
def backend_version(name: str) -> str:
    """Return what decides how fast and how exact a backend is: its library, and for ours knnbench; numpy's BLAS."""
    from knnbench import __version__

    registration = registry()[name]
    parts = [f"{registration.distributions[0]} {version_of(name)}"]
    if "numpy" in registration.distributions:
        blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
        parts.append(f"{blas.get('name')} {blas.get('version')}")
    if not registration.peer:
        parts.append(f"knnbench {__version__}")
    return ", ".join(dict.fromkeys(parts))


def by_group(samples: Iterable[Sample]) -> dict[Group, list[Sample]]:
    """Return samples by their group."""
    found: dict[Group, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.group, []).append(sample)
    return found


def is_current(sample: Sample) -> bool:
    """Return whether a sample is of the version installed."""
    return sample.backend in registry() and sample.version == backend_version(sample.backend)


def machine_facts() -> dict[str, Any]:
    """Return what names a machine in its wisdom."""
    from knnbench.measure.machine import describe_machine

    facts = describe_machine()
    gpus = [{name: gpu.get(name, "") for name in ("name", "driver")} for gpu in facts["gpus"]]
    return {"cpu": facts["cpu"], "features": facts["features"], "threads": thread_count(), "gpus": gpus}


def machine_key() -> str:
    """Return a hash of `machine_facts`."""
    return _machine_key(thread_count())


@functools.cache
def _machine_key(threads: int) -> str:
    return hashlib.sha256(json.dumps(machine_facts(), sort_keys=True).encode()).hexdigest()[:16]


def wisdom_path() -> Path:
    """Return the file of this machine's wisdom."""
    return _path(os.environ.get(WISDOM_VARIABLE, ""), os.environ.get("KNNBENCH_CACHE", ""), machine_key())


@functools.cache
def _path(folder: str, cache: str, key: str) -> Path:
    import platformdirs

    cache = cache or str(platformdirs.user_cache_path("knnbench"))
    return Path(folder or Path(cache) / "wisdom") / f"{key}.jsonl"


class Wisdom:
    """What is known of a machine: samples, fits and errors.

    Parameters
    ----------
    path : Path or None
        The file of this machine; None for what comes with the package only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.shipped_on, self.shipped_threads, self.shipped, self._shipped_samples = _shipped()
        self.own = _Lines()
        if path is not None and path.exists():
            self._read(path)
        self._samples: dict[Group, list[Sample]] | None = None
        self._costs: dict[Group, dict[str, Cost]] = {}
        self._pooled: dict[tuple[Pool, str, bool], Cost] = {}

    def _read(self, path: Path) -> None:
        header, *lines = path.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
        try:
            first = json.loads(header)
            if first["wisdom"] != SCHEMA or first["machine"] != machine_facts():
                raise ValueError("it is of another machine or schema")
            self.own.take(lines)
        except (ValueError, KeyError, TypeError) as error:
            aside = path.with_suffix(f".{os.getpid()}.corrupt")
            path.replace(aside)
            self.own = _Lines()
            warnings.warn(
                f"wisdom in {path} cannot be read ({type(error).__name__}: {error}) and was moved to {aside.name}; "
                f"`knnbench calibrate` measures it again.",
                RuntimeWarning,
                stacklevel=4,
            )

    def samples(self, group: Group) -> list[Sample]:
        """Return this machine's samples of a kind, of the versions installed."""
        if self._samples is None:
            self._samples = by_group(self.fresh)
        return self._samples.get(group, [])

    def _pool(self, pool: Pool) -> list[Sample]:
        return [s for s in self.own.samples.get(pool, {}).values() if is_current(s)]

    @property
    def groups(self) -> list[Group]:
        """All that there are measurements of, here or by default, of any version."""
        return sorted({sample.group for lines in (self.own, self.shipped) for sample in lines})

    @property
    def fresh(self) -> list[Sample]:
        """The samples of the versions installed."""
        return [sample for sample in self.own if is_current(sample)]

    @property
    def stale(self) -> list[Sample]:
        """The samples of other versions than those installed."""
        return [sample for sample in self.own if not is_current(sample)]

    def costs(self, group: Group) -> dict[str, Cost]:
        """Return the costs of a backend on a kind of computation by quantity; empty where nothing is known."""
        if group not in self._costs:
            self._costs[group] = self._find_costs(group)
        return self._costs[group]

    def start(self, group: Group) -> float:
        """Return the seconds that the first call of a process takes beyond those of any other."""
        every = [*self._shipped(group), *self.samples(group)]
        return next((sample.start for sample in reversed(every) if sample.start), 0.0)

    def threads(self, group: Group) -> int:
        """Return the threads of the calls that the costs of a group are of."""
        is_default = self._shipped(group) and not self._pool(pool_of(group))
        return self.shipped_threads if is_default else thread_count()

    def source(self, group: Group) -> str:
        """Return where the costs of a group come from."""
        if group != as_fast(group) and not self.samples(group) and group not in self._shipped_samples:
            return f"{self.source(as_fast(group))}, of fast searches"
        n_kind, n_all = len(self.samples(group)), len(self._pool(pool_of(group)))
        here = f"{n_kind} measurement{'s' if n_kind != 1 else ''} here, {n_all} of its backend"
        if (n_kind and n_all >= SUFFICIENT) or not self._shipped(group):
            return here
        return f"defaults from {self.shipped_on}" + (f", scaled by {here}" if n_all else "")

    def _shipped(self, group: Group) -> list[Sample]:
        """Return the defaults of a kind; where there are none of exact searches, those of fast ones."""
        return self._shipped_samples.get(group) or self._shipped_samples.get(as_fast(group), [])

    def _find_costs(self, group: Group) -> dict[str, Cost]:
        """Return costs from what was measured here if that is enough, and of this kind; otherwise from the defaults."""
        pool, finds, result = pool_of(group), (self._cost_here, self._default_cost), {}
        # Where no exact search was measured, it is taken for a fast one.
        kinds: list[Any] = [group, as_fast(group)]
        asked = [Problem(op, 1, 1, 1, 1, *kind) for _, op, *kind in kinds]
        for quantity in QUANTITIES:
            costs = ((problem, find(pool, quantity)) for problem in asked for find in finds)
            found = next((cost for problem, cost in costs if cost is not None and cost.knows(problem)), None)
            if found is not None:
                result[quantity] = found
        return result

    def _cost_here(self, pool: Pool, quantity: str) -> Cost | None:
        """Return the cost by what was measured here, None if that is too little."""
        own, defaults = self._measured(pool, quantity), self._defaults(pool, quantity)
        if not own or (defaults and len(own) < SUFFICIENT):
            return None
        return self._pooled_cost((pool, quantity, False), own, self.own)

    def _default_cost(self, pool: Pool, quantity: str) -> Cost | None:
        """Return the cost by the defaults, corrected by what was measured here, None if there are none."""
        defaults = self._defaults(pool, quantity)
        if not defaults:
            return None
        return self._pooled_cost((pool, quantity, True), defaults, self.shipped, self._measured(pool, quantity))

    def _pooled_cost(
        self, key: tuple[Pool, str, bool], samples: list[Sample], lines: "_Lines", here: Sequence[Sample] = ()
    ) -> Cost:
        if key not in self._pooled:
            self._pooled[key] = _cost(key[1], samples, lines.fits.get(key[0], {}), here)
        return self._pooled[key]

    def _measured(self, pool: Pool, quantity: str) -> list[Sample]:
        samples = [sample for sample in self._pool(pool) if quantity in sample.seconds]
        # What a proof takes is not fitted to a few exact searches, however many fast ones there are.
        proofs = Counter(sample.problem.dtype for sample in samples if sample.problem.is_proved)
        few = {dtype for dtype, count in proofs.items() if count < SUFFICIENT_PROOFS}
        return [s for s in samples if not (s.problem.is_proved and s.problem.dtype in few)][-MOST_SAMPLES:]

    def _defaults(self, pool: Pool, quantity: str) -> list[Sample]:
        return [s for s in self.shipped.samples.get(pool, {}).values() if quantity in s.seconds]

    def error(self, backend: str, metric: str, dtype: str) -> dict[str, Any] | None:
        """Return what is known of the error of the version installed: its ordinary and adversarial error, a reason."""
        for lines in (self.own, self.shipped):
            found = lines.errors.get((backend, metric, dtype))
            if found is not None and found["version"] == backend_version(backend):
                return found
        return None

    def add(self, samples: Iterable[Sample] = (), errors: Iterable[dict[str, Any]] = (), *, fit: bool = False) -> None:
        """Keep samples and errors, in the file too, and fit the terms of these samples' backends if they have enough.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        samples = list(samples)
        new = [json.dumps({"sample": sample.to_dict()}) for sample in samples]
        new += [json.dumps({"error": error}) for error in errors]
        self.own.take(new)
        if fit:
            fits = list(self._fits({sample.pool for sample in samples}))
            self.own.take(fits)
            new += fits
        self._samples = None
        self._costs.clear()
        self._pooled.clear()
        if new and self.path is not None:
            append(self.path, new)

    def _fits(self, pools: set[Pool]) -> Iterator[str]:
        for pool in sorted(pools):
            own = self._pool(pool)[-MOST_SAMPLES:]
            if len(own) >= ENOUGH:
                yield json.dumps({"fit": fit_line(pool, own)})


class _Lines:
    """Lines of a file, by what they are about; the last of equal ones counts."""

    def __init__(self) -> None:
        self.samples: dict[Pool, dict[Any, Sample]] = {}
        self.fits: dict[Pool, dict[str, Any]] = {}
        self.errors: dict[tuple[str, str, str], dict[str, Any]] = {}

    def __iter__(self) -> Iterator[Sample]:
        return (sample for of_pool in self.samples.values() for sample in of_pool.values())

    def take(self, lines: Iterable[str]) -> None:
        for text in lines:
            if not text.endswith("}"):  # a process was killed as it wrote
                continue
            line = json.loads(text)
            if "sample" in line:
                sample = Sample.from_dict(line["sample"])
                of_pool = self.samples.setdefault(sample.pool, {})
                of_pool.pop((sample.version, sample.problem), None)  # the last one is also the newest
                of_pool[sample.version, sample.problem] = sample
            elif "fit" in line:
                backend, op, data_on = line["fit"]["pool"]
                self.fits[backend, op, data_on] = line["fit"]
            elif "error" in line:
                error = line["error"]
                self.errors[error["backend"], error["metric"], error["dtype"]] = error
            else:
                raise ValueError(f"a line of unknown kind: {text[:60]}")


@functools.cache
def _shipped() -> tuple[str, int, _Lines, dict[Group, list[Sample]]]:
    """Return the CPU that the defaults were measured on, its threads, and the defaults, also by their group."""
    text = files("knnbench.selection").joinpath("defaults.jsonl").read_text(encoding="utf-8")
    header, *lines = text.splitlines()
    found = _Lines()
    found.take(lines)
    machine = json.loads(header)["machine"]
    return machine["cpu"], machine["threads"], found, by_group(found)


def fit_line(pool: Pool, samples: list[Sample]) -> dict[str, Any]:
    """Return the costs of the terms fitted to samples, as a line holds them."""
    line: dict[str, Any] = {"pool": list(pool), "version": samples[0].version}
    for quantity in QUANTITIES:
        measured = [sample for sample in samples if quantity in sample.seconds]
        if len(measured) >= ENOUGH:
            line[quantity] = fit_terms(quantity, *_measured(quantity, measured))
    return line


def _cost(quantity: str, samples: list[Sample], fit: dict[str, Any], here: Sequence[Sample] = ()) -> Cost:
    """Return a cost from samples; or from another machine's, and some from here, which took a factor longer."""
    problems, seconds = _measured(quantity, samples)
    terms = fit.get(quantity)
    if not terms or fit["version"] != samples[0].version or not _has_all(terms, quantity, problems):
        terms = fit_terms(quantity, problems, seconds)
    cost = Cost(quantity, terms, problems, seconds)
    own = [sample for sample in here if cost.knows(sample.problem)]
    if not own:
        return cost
    places, took = _measured(quantity, own)
    logs = [float(np.log(t / cost.predict(problem).seconds)) for problem, t in zip(places, took, strict=True)]
    factor = float(np.exp(np.median(logs)))
    return Cost(quantity, terms, problems + places, np.concatenate([seconds, took / factor]), factor)


def _measured(quantity: str, samples: list[Sample]) -> tuple[list[Problem], Any]:
    return [sample.problem for sample in samples], np.array([sample.seconds[quantity] for sample in samples])


def _has_all(terms: dict[str, float], quantity: str, problems: list[Problem]) -> bool:
    return all(rate in terms for problem in problems for rate in rates_of(quantity, problem))


def append(path: Path, lines: list[str]) -> None:
    """Append lines to a file of wisdom in one write, its first line first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = json.dumps({"wisdom": SCHEMA, "machine": machine_facts()})
    # Linked under its name when it is whole: of two processes that begin at once, one does.
    new = path.with_suffix(f".{os.getpid()}.new")
    if not path.exists():
        new.write_text(header + "\n", encoding="utf-8")
        try:
            os.link(new, path)
        except FileExistsError:
            pass
        finally:
            new.unlink()
    # A line that a killed process left without its end must not take the next one with it.
    text = "\n" * (not path.read_bytes().endswith(b"\n")) + "\n".join(lines) + "\n"
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)


@functools.cache
def _wisdom(path: Path) -> Wisdom:
    return Wisdom(path)


def wisdom() -> Wisdom:
    """Return this machine's wisdom, read once a process."""
    return _wisdom(wisdom_path())


def forget() -> None:
    """Read the wisdom again when it is next asked for."""
    _wisdom.cache_clear()
