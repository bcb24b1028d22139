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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from knnbench.backends import registry, version_of
from knnbench.threads import thread_count

from .costs import ENOUGH, QUANTITIES, TERMS, Cost, fit_terms
from .problem import Problem

__all__ = ["Sample", "Wisdom", "backend_version", "forget", "machine_key", "wisdom", "wisdom_path"]

SCHEMA = 1

WISDOM_VARIABLE = "KNNBENCH_WISDOM"

# As how many measurements of a kind of computation those of the backend's other kinds count.
BELIEVED = 3

Group = tuple[str, ...]


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

    def to_dict(self) -> dict[str, Any]:
        """Return what a line holds."""
        kind = {"backend": self.backend, "version": self.version, **asdict(self.problem)}
        return {**kind, **self.seconds, "start": self.start}

    @classmethod
    def from_dict(cls, line: dict[str, Any]) -> "Sample":
        """Return the sample of a line; raise KeyError, TypeError or ValueError if it holds none."""
        names = Problem.__dataclass_fields__
        problem = Problem(**{name: line[name] for name in names})
        seconds = {name: float(line[name]) for name in QUANTITIES if name in line}
        if "call" not in seconds or not all(0 < value < np.inf for value in seconds.values()):
            raise ValueError(f"no seconds: {seconds}")
        return cls(str(line["backend"]), str(line["version"]), problem, seconds, float(line["start"]))


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


def machine_facts() -> dict[str, Any]:
    """Return what names a machine in its wisdom."""
    from knnbench.measure.machine import describe_machine

    facts = describe_machine()
    gpus = [{name: gpu.get(name, "") for name in ("name", "driver")} for gpu in facts["gpus"]]
    return {"cpu": facts["cpu"], "features": facts["features"], "threads": thread_count(), "gpus": gpus}


def machine_key() -> str:
    """Return a hash of `machine_facts`."""
    return hashlib.sha256(json.dumps(machine_facts(), sort_keys=True).encode()).hexdigest()[:16]


def wisdom_path() -> Path:
    """Return the file of this machine's wisdom."""
    import platformdirs

    cache = os.environ.get("KNNBENCH_CACHE") or platformdirs.user_cache_path("knnbench")
    return Path(os.environ.get(WISDOM_VARIABLE) or Path(cache) / "wisdom") / f"{machine_key()}.jsonl"


class Wisdom:
    """What is known of a machine: samples, fits and errors.

    Parameters
    ----------
    path : Path or None
        The file of this machine; None for what comes with the package only.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.shipped_on, self.shipped_threads, self.shipped = _shipped()
        self.own = _Lines()
        if path is not None and path.exists():
            self._read(path)
        self._costs: dict[Group, dict[str, Cost]] = {}
        self._factors: dict[str, float] = {}

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
        found = self.own.samples.get(group, {}).values()
        return [sample for sample in found if sample.version == backend_version(group[0])]

    @property
    def stale(self) -> list[Sample]:
        """The samples of other versions than those installed."""
        every = (sample for of_group in self.own.samples.values() for sample in of_group.values())
        known = registry()
        return [s for s in every if s.backend not in known or s.version != backend_version(s.backend)]

    def costs(self, group: Group) -> dict[str, Cost]:
        """Return the costs of a backend on a kind of computation by quantity; empty where nothing is known."""
        if group not in self._costs:
            self._costs[group] = self._find_costs(group)
        return self._costs[group]

    def start(self, group: Group) -> float:
        """Return the seconds that the first call of a process takes beyond those of any other."""
        every = [*self.shipped.samples.get(group, {}).values(), *self.samples(group)]
        return next((sample.start for sample in reversed(every) if sample.start), 0.0)

    def threads(self, group: Group) -> int:
        """Return the threads of the calls that the costs of a group are of."""
        return thread_count() if self.samples(group) or group not in self.shipped.samples else self.shipped_threads

    def source(self, group: Group) -> str:
        """Return where the costs of a group come from."""
        n_samples = len(self.samples(group))
        here = f"{n_samples} measurement{'s' if n_samples != 1 else ''} here"
        if n_samples >= ENOUGH or group not in self.shipped.samples:
            return here
        return f"defaults from {self.shipped_on}" + (f", scaled by {here}" if n_samples else "")

    def _find_costs(self, group: Group) -> dict[str, Cost]:
        own, shipped = self.samples(group), list(self.shipped.samples.get(group, {}).values())
        result = {}
        for quantity in QUANTITIES:
            measured = [sample for sample in own if quantity in sample.seconds]
            if len(measured) >= ENOUGH or not shipped:
                if measured:
                    result[quantity] = _cost(quantity, measured, self.own.fits.get(group, {}))
                continue
            fit, defaults = self.shipped.fits.get(group, {}), [s for s in shipped if quantity in s.seconds]
            if not defaults:
                continue
            default = _cost(quantity, defaults, fit)
            factor = self._factor(group[0])
            if measured:
                logs = [float(np.log(s.seconds[quantity] / default.predict(s.problem).seconds)) for s in measured]
                factor = float(np.exp((sum(logs) + BELIEVED * np.log(factor)) / (len(logs) + BELIEVED)))
            result[quantity] = _cost(quantity, defaults, fit, measured, factor)
        return result

    def _factor(self, backend: str) -> float:
        """Return how much longer calls of a backend take here than on the machine of the defaults."""
        if backend not in self._factors:
            logs = []
            for group, shipped in self.shipped.samples.items():
                own = self.samples(group) if group[0] == backend else []
                if own:
                    default = _cost("call", list(shipped.values()), self.shipped.fits.get(group, {}))
                    logs += [float(np.log(s.seconds["call"] / default.predict(s.problem).seconds)) for s in own]
            self._factors[backend] = float(np.exp(np.median(logs))) if logs else 1.0
        return self._factors[backend]

    def error(self, backend: str, metric: str, dtype: str) -> dict[str, Any] | None:
        """Return what is known of the error of the version installed: its ordinary and adversarial error, a reason."""
        for lines in (self.own, self.shipped):
            found = lines.errors.get((backend, metric, dtype))
            if found is not None and found["version"] == backend_version(backend):
                return found
        return None

    def add(self, samples: Iterable[Sample] = (), errors: Iterable[dict[str, Any]] = (), *, fit: bool = False) -> None:
        """Keep samples and errors, in the file too, and fit the terms of the kinds that have enough samples.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        new = [json.dumps({"sample": sample.to_dict()}) for sample in samples]
        new += [json.dumps({"error": error}) for error in errors]
        self.own.take(new)
        if fit:
            fits = list(self._fits())
            self.own.take(fits)
            new += fits
        self._costs.clear()
        self._factors.clear()
        if new and self.path is not None:
            append(self.path, new)

    def _fits(self) -> Iterator[str]:
        for group in self.own.samples:
            own = self.samples(group)
            if len(own) >= ENOUGH:
                yield json.dumps({"fit": fit_line(group, own)})


class _Lines:
    """Lines of a file, by what they are about; the last of equal ones counts."""

    def __init__(self) -> None:
        self.samples: dict[Group, dict[Any, Sample]] = {}
        self.fits: dict[Group, dict[str, Any]] = {}
        self.errors: dict[tuple[str, str, str], dict[str, Any]] = {}

    def take(self, lines: Iterable[str]) -> None:
        for text in lines:
            if not text.endswith("}"):  # a process was killed as it wrote
                continue
            line = json.loads(text)
            if "sample" in line:
                sample = Sample.from_dict(line["sample"])
                self.samples.setdefault(sample.group, {})[sample.version, sample.problem] = sample
            elif "fit" in line:
                self.fits[tuple(line["fit"]["group"])] = line["fit"]
            elif "error" in line:
                error = line["error"]
                self.errors[error["backend"], error["metric"], error["dtype"]] = error
            else:
                raise ValueError(f"a line of unknown kind: {text[:60]}")


@functools.cache
def _shipped() -> tuple[str, int, _Lines]:
    """Return the CPU that the defaults were measured on, with how many threads, and the defaults."""
    text = files("knnbench.selection").joinpath("defaults.jsonl").read_text(encoding="utf-8")
    header, *lines = text.splitlines()
    found = _Lines()
    found.take(lines)
    machine = json.loads(header)["machine"]
    return machine["cpu"], machine["threads"], found


def fit_line(group: Group, samples: list[Sample]) -> dict[str, Any]:
    """Return the costs of the terms fitted to samples, as a line holds them."""
    line: dict[str, Any] = {"group": list(group), "version": samples[0].version}
    for quantity in QUANTITIES:
        measured = [sample for sample in samples if quantity in sample.seconds]
        if len(measured) >= ENOUGH:
            seconds = np.array([sample.seconds[quantity] for sample in measured])
            line[quantity] = fit_terms(quantity, [sample.problem for sample in measured], seconds)
    return line


def _cost(
    quantity: str, samples: list[Sample], fit: dict[str, Any], here: Sequence[Sample] = (), factor: float = 1.0
) -> Cost:
    """Return a cost from samples, or from another machine's, which took a factor less, and a few from here."""
    seconds = np.array([s.seconds[quantity] for s in samples] + [s.seconds[quantity] / factor for s in here])
    problems = [sample.problem for sample in (*samples, *here)]
    is_fitted = len(fit.get(quantity, ())) == len(TERMS[quantity]) and fit.get("version") == samples[0].version
    terms = fit[quantity] if is_fitted else fit_terms(quantity, problems[: len(samples)], seconds[: len(samples)])
    return Cost(quantity, terms, problems, seconds, factor)


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
