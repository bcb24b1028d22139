"""What this machine can do at best, measured by small probes, and the least time that follows for a kernel.

A ceiling is the rate of one instruction, or of one path of data, by itself. It is measured and not taken from a data
sheet, because clocks, virtual machines and containers decide it. A probe is a function of the number of threads and
the seconds to fill that returns a rate, and one entry in `PROBES`.
"""

import math
from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from knnbench.errors import BackendUnavailableError, InvalidInputError

from .process import WorkerEnded, run_worker

__all__ = ["PROBES", "Ceiling", "Ceilings", "Probe", "floor"]

WORKER = "knnbench.measure.probe_worker"

# Seconds filled by each probe, and to wait for its answer: libraries are loaded and kernels compiled meanwhile.
PROBE_S = 0.4
LIMIT_S = 120.0

HOST = "knnbench.measure.host_probes"
DEVICE = "knnbench.measure.device_probes"

Unit = Literal["operations/s", "bytes/s"]


@dataclass(frozen=True, slots=True)
class Probe:
    """How one ceiling is measured.

    Attributes
    ----------
    name : str
    unit : str
        ``"operations/s"`` or ``"bytes/s"``. An operation treats one element: a vector instruction is as many as it
        has lanes, and a multiply-add is one.
    device : str
        ``"cpu"`` or ``"cuda"``.
    description : str
        What is measured and how, in a line.
    target : str
        ``module:function``, imported where it is measured. The function takes ``(threads, seconds)`` and returns the
        best rate of several repeats that fill the seconds: a ceiling is a maximum.
    """

    name: str
    unit: Unit
    device: Literal["cpu", "cuda"]
    description: str
    target: str


_PROBES = (
    Probe("read", "bytes/s", "cpu", "memory read, past all caches", f"{HOST}:read"),
    Probe("copy", "bytes/s", "cpu", "memory copied past all caches, read and written bytes counted", f"{HOST}:copy"),
    Probe("add-float32", "operations/s", "cpu", "vector additions in independent chains", f"{HOST}:add_float32"),
    Probe("add-float64", "operations/s", "cpu", "vector additions in independent chains", f"{HOST}:add_float64"),
    Probe("fma-float32", "operations/s", "cpu", "vector multiply-adds in independent chains", f"{HOST}:fma_float32"),
    Probe("fma-float64", "operations/s", "cpu", "vector multiply-adds in independent chains", f"{HOST}:fma_float64"),
    Probe("sad-uint8", "operations/s", "cpu", "absolute differences, summed by eight (SAD)", f"{HOST}:sad_uint8"),
    Probe("madd-int16", "operations/s", "cpu", "multiply-adds, summed by two (VPMADDWD)", f"{HOST}:madd_int16"),
    Probe("dot-uint8", "operations/s", "cpu", "multiply-adds, summed by four (VNNI)", f"{HOST}:dot_uint8"),
    Probe("matrix-uint8", "operations/s", "cpu", "multiply-adds of a matrix unit (AMX)", f"{HOST}:matrix_uint8"),
    Probe("gemm-float32", "operations/s", "cpu", "multiply-adds of numpy's matrix product", f"{HOST}:gemm_float32"),
    Probe("gemm-float64", "operations/s", "cpu", "multiply-adds of numpy's matrix product", f"{HOST}:gemm_float64"),
    Probe("copy-in", "bytes/s", "cuda", "page-locked host memory to the device", f"{DEVICE}:copy_in"),
    Probe("copy-out", "bytes/s", "cuda", "the device to page-locked host memory", f"{DEVICE}:copy_out"),
    Probe("cuda-read", "bytes/s", "cuda", "device memory read, past its cache", f"{DEVICE}:read"),
    Probe("cuda-add-float32", "operations/s", "cuda", "additions in independent chains", f"{DEVICE}:add_float32"),
    Probe("cuda-add-float64", "operations/s", "cuda", "additions in independent chains", f"{DEVICE}:add_float64"),
    Probe("cuda-fma-float32", "operations/s", "cuda", "multiply-adds in independent chains", f"{DEVICE}:fma_float32"),
    Probe("cuda-fma-float64", "operations/s", "cuda", "multiply-adds in independent chains", f"{DEVICE}:fma_float64"),
    Probe("cuda-sad-uint8", "operations/s", "cuda", "absolute differences, summed by four", f"{DEVICE}:sad_uint8"),
    Probe("cuda-dot-uint8", "operations/s", "cuda", "multiply-adds, summed by four (dp4a)", f"{DEVICE}:dot_uint8"),
    Probe("cuda-matrix-int8", "operations/s", "cuda", "multiply-adds of mma.sync (IMMA)", f"{DEVICE}:matrix_int8"),
    Probe(
        "cuda-matrix-bfloat16", "operations/s", "cuda", "multiply-adds of mma.sync (HMMA)", f"{DEVICE}:matrix_bfloat16"
    ),
    Probe("cuda-gemm-int8", "operations/s", "cuda", "multiply-adds of cuBLAS, exact", f"{DEVICE}:gemm_int8"),
    Probe(
        "cuda-gemm-bfloat16",
        "operations/s",
        "cuda",
        "multiply-adds of cuBLAS, with sums in float32",
        f"{DEVICE}:gemm_bfloat16",
    ),
    Probe(
        "cuda-gemm-float16",
        "operations/s",
        "cuda",
        "multiply-adds of cuBLAS, with sums in float32",
        f"{DEVICE}:gemm_float16",
    ),
    Probe(
        "cuda-gemm-float32", "operations/s", "cuda", "multiply-adds of cuBLAS, without TF32", f"{DEVICE}:gemm_float32"
    ),
    Probe("cuda-gemm-float64", "operations/s", "cuda", "multiply-adds of cuBLAS", f"{DEVICE}:gemm_float64"),
)

PROBES: dict[str, Probe] = {probe.name: probe for probe in _PROBES}


@dataclass(frozen=True, slots=True)
class Ceiling:
    """A ceiling, or why there is none here.

    Attributes
    ----------
    name : str
        Of its probe.
    rate : float or None
        Operations, or bytes, a second.
    unit : str
    reason : str
        Empty where there is a rate.
    contention : float or None
        Share of the CPUs that other processes took from the probe, which makes the rate too low; None if not known.
    """

    name: str
    rate: float | None
    unit: Unit
    reason: str
    contention: float | None = None


class Ceilings:
    """The ceilings of this machine, each measured when it is first asked for, in a process of its own.

    Parameters
    ----------
    threads : int
        That the CPU's probes use, and that every thread pool of that process is held at.
    seconds : float
        Filled by each probe; loading libraries and filling memory comes on top.

    Attributes
    ----------
    reasons : dict of str to str
        Why a probe gave no rate.
    """

    def __init__(self, threads: int, seconds: float = PROBE_S) -> None:
        self.threads = threads
        self.seconds = seconds
        self.reasons: dict[str, str] = {}
        self._rates: dict[str, float] = {}
        self._contention: dict[str, float | None] = {}

    def rate(self, name: str) -> float | None:
        """Return a ceiling in its probe's unit, None if the probe cannot run here: `reasons` then says why.

        Raises
        ------
        InvalidInputError
            If there is no such probe.
        """
        (ceiling,) = self.measure([name])
        return ceiling.rate

    def again(self, name: str) -> float:
        """Measure a ceiling once more, and return the larger of its rates.

        Raises
        ------
        InvalidInputError
            If there is no such probe.
        BackendUnavailableError
            If it has never given a rate here.
        """
        _check_known([name])
        for _ in self._run([name]):
            pass
        if name not in self._rates:
            raise BackendUnavailableError(f"probe {name!r} gives no rate here: {self.reasons[name]}")
        return self._rates[name]

    def measure(self, names: Iterable[str] | None = None) -> Iterator[Ceiling]:
        """Yield ceilings in the order asked for, those not yet known as soon as each is measured.

        Parameters
        ----------
        names : iterable of str, optional
            Of probes; default all.

        Raises
        ------
        InvalidInputError
            If there is no such probe.
        """
        asked = list(PROBES if names is None else names)
        _check_known(asked)
        return self._measured(asked)

    def _measured(self, asked: list[str]) -> Iterator[Ceiling]:
        is_known = self._rates.keys() | self.reasons.keys()
        run = self._run([name for name in dict.fromkeys(asked) if name not in is_known])
        try:
            for name in asked:
                while name not in self._rates and name not in self.reasons:
                    next(run)
                rate, reason = self._rates.get(name), self.reasons.get(name, "")
                yield Ceiling(name, rate, PROBES[name].unit, reason, self._contention.get(name))
        finally:
            run.close()

    def _run(self, names: list[str]) -> Generator[None]:
        """Measure probes in their order; after each step one more has a rate or a reason."""
        left = list(names)
        while left:
            job = {"probes": list(left), "threads": self.threads, "seconds": self.seconds}
            messages: Any = run_worker(WORKER, job, self.threads, LIMIT_S)  # a generator: closing it ends the process
            reason = "the process ended before its answer"
            try:
                for message in messages:
                    self._take(left.pop(0), message)
                    yield
            except WorkerEnded as ended:
                reason = str(ended)
            finally:
                messages.close()
            # What the process died of is a fact about the probe that it was at; the others get a new process.
            if left:
                self._take(left.pop(0), {"reason": reason})
                yield

    def _take(self, name: str, message: dict[str, Any]) -> None:
        rate = message.get("rate")
        if rate is None:
            # A rate that is known stays: that the probe failed later says nothing against it.
            if name not in self._rates:
                self.reasons[name] = message["reason"]
            return
        if rate > self._rates.get(name, 0.0):
            self._rates[name], self._contention[name] = rate, message.get("contention")
        self.reasons.pop(name, None)


def floor(operations: Mapping[str, float], ceilings: Ceilings) -> tuple[float | None, str]:
    """Return the least time that a computation can take, and what decides it.

    Parameters
    ----------
    operations : mapping of str to float
        For probes by name, the operations or bytes that the computation really does.
    ceilings : Ceilings

    Returns
    -------
    seconds : float or None
        The longest that any kind of operation takes at its ceiling. Kinds may overlap perfectly, so that their sum
        would be no lower bound. None if no rate is known.
    name : str
        Of the probe that decides; empty if there is none.

    Raises
    ------
    InvalidInputError
        If there is no such probe, or a number of operations is negative or not finite.
    """
    for name, count in operations.items():
        if not 0 <= count < math.inf:
            raise InvalidInputError(f"operations of {name!r} are {count!r}; expected a finite number from 0 on.")
    rates = {ceiling.name: ceiling.rate for ceiling in ceilings.measure(operations)}
    seconds = {name: operations[name] / rate for name, rate in rates.items() if rate is not None}
    if not seconds:
        return None, ""
    name = max(seconds, key=seconds.__getitem__)
    return seconds[name], name


def _check_known(names: Iterable[str]) -> None:
    for name in names:
        if name not in PROBES:
            raise InvalidInputError(f"probe {name!r} is unknown; expected one of: {', '.join(PROBES)}.")
