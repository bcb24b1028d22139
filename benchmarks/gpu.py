"""What a GPU reaches on MNIST and on a million rows, beside PyTorch's product and ``cdist``, as a table with targets.

Run it as ``python -m benchmarks.gpu`` from a checkout on a machine with an NVIDIA GPU and its driver, a CUDA build of
torch, CuPy and numba-cuda (``pip install -e '.[cuda13,test]'``), and MNIST (``knnbench data fetch mnist``). Ceilings
of the device are measured first; then every CUDA backend, own and peers, takes turns on each case, answers checked, by
the runner of ``knnbench run``. Records are appended to a file of ``results/`` named after the GPU: after an
interruption the same command goes on, and ``--show FILE`` prints the newest run again. Targets are for one H100 (SXM).
"""

import argparse
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from knnbench import KnnbenchError
from knnbench.backends import backends_on, registry
from knnbench.measure import Case, Plan
from knnbench.measure.ceilings import PROBES, Ceilings
from knnbench.measure.machine import describe_machine
from knnbench.results import Record, median_interval, read_records

from . import runs

BASELINES = ("torch-mm-cuda", "torch-cdist-cuda")

# Of the table where no terminal says its own.
WIDTH = 160

MILLION = {"n_train": 1_000_000, "n_test": 10_000, "n_features": 128}


@dataclass(frozen=True, slots=True)
class Target:
    """One line of what is to be reached.

    Attributes
    ----------
    case : Case
    phase : str
        Of `knnbench.results.PHASES`: what is timed.
    floor : (str, float)
        The ceiling that bounds it, and how many of its operations a feature of a pair takes; of a path of data, how
        many bytes a feature of a row.
    seconds : float or None
        On one H100, at most.
    of_floor : float or None
        At most so many times the floor, by the ceiling as it was measured; then `seconds` holds where there is none.
    of_product : float or None
        At most this share of the time of PyTorch's product and topk.
    """

    case: Case
    phase: str
    floor: tuple[str, float]
    seconds: float | None = None
    of_floor: float | None = None
    of_product: float | None = None

    def floor_s(self, rates: dict[str, float]) -> float | None:
        """Return the least seconds by the ceilings measured, None without the one that bounds it."""
        name, count = self.floor
        case = self.case
        if name not in rates:
            return None
        is_path = PROBES[name].unit == "bytes/s"
        rows = case.n_queries + case.n_corpus if is_path else case.n_queries * case.n_corpus
        return rows * case.n_features * count / rates[name]

    def at_most_s(self, rates: dict[str, float], product_s: float | None) -> float | None:
        """Return the seconds that are not to be exceeded, None where no limit is known."""
        floor_s, limits = self.floor_s(rates), []
        if self.of_floor is not None and floor_s is not None:
            limits.append(self.of_floor * floor_s)
        elif self.seconds is not None:
            limits.append(self.seconds)
        if self.of_product is not None and product_s is not None:
            limits.append(self.of_product * product_s)
        return min(limits, default=None)


def targets() -> list[Target]:
    """Return the lines of the table, in its order."""
    city, wide_city = (Case("knn", "cityblock", *_mnist(dtype)) for dtype in ("uint8", "float32"))
    euclid, wide = (Case("knn", "euclidean", *_mnist(dtype)) for dtype in ("uint8", "float32"))
    million = Case("knn", "euclidean", "synthetic", "float32", 10, 10_000, 1_000_000, 128, MILLION)
    return [
        Target(city, "device", ("cuda-sad-uint8", 1), 11e-3, of_floor=1.55),
        Target(wide_city, "device", ("cuda-add-float32", 2), 42e-3),
        Target(euclid, "device", ("cuda-gemm-int8", 1), 2.5e-3),
        Target(wide, "device", ("cuda-gemm-float16", 1), 20e-3, of_product=0.7),
        Target(euclid, "from_pinned", ("copy-in", 1), 6e-3),
        Target(euclid, "from_pageable", ("copy-in", 1), 10e-3),
        Target(million, "device", ("cuda-gemm-float16", 1), of_product=0.7),
    ]


def _mnist(dtype: str) -> tuple[str, str, int, int, int, int]:
    return "mnist", dtype, 3, 10_000, 60_000, 784


def rows(lines: Sequence[Target], records: Sequence[Record], rates: dict[str, float]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table: for each target the own backends, the fastest first, and what to measure them by."""
    for line in lines:
        cells = {record.backend: record for record in records if record.case == line.case.name and not record.twin}
        product_s, distances_s = (_seconds(cells.get(name), line.phase, scaled=True) for name in BASELINES)
        floor_s, at_most_s = line.floor_s(rates), line.at_most_s(rates, product_s)
        own = [record for name, record in cells.items() if not registry()[name].peer]
        timed = [(seconds, record) for record in own if (seconds := _seconds(record, line.phase)) is not None]
        head = line.case.name, line.phase
        if not timed:
            yield *head, "; ".join(sorted({f"{r.backend}: {r.status}, {r.reason}" for r in own})) or "not measured"
        for seconds, record in sorted(timed, key=lambda pair: pair[0]):
            _, low, high = median_interval(record.phases[line.phase])
            yield (
                *head,
                record.backend,
                f"{_milliseconds(seconds)} ± {(high - low) / 2 / seconds:.0%}",
                _milliseconds(floor_s),
                "" if floor_s is None else f"{floor_s / seconds:.0%} of {line.floor[0]}",
                _milliseconds(at_most_s),
                "" if at_most_s is None else "yes" if seconds <= at_most_s else "no",
                *("" if peer_s is None else f"{seconds / peer_s:.3g}" for peer_s in (product_s, distances_s)),
            )


def _seconds(record: Record | None, phase: str, *, scaled: bool = False) -> float | None:
    """Return the median of a phase of an answer that is right, of all queries; or scaled to them, of a slow peer."""
    if record is None or record.status != "ok" or not record.complete or (record.is_sampled and not scaled):
        return None
    seconds, pairs = record.phase_s(phase), record.n_queries * record.n_corpus
    return None if seconds is None else seconds * pairs / (record.measured_queries * record.measured_corpus)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{1e3 * seconds:.3g}"


def table(lines: Sequence[Target], records: Sequence[Record], rates: dict[str, float], title: str) -> Table:
    """Return the table."""
    headings = (
        "case",
        "phase",
        "backend",
        "ms",
        "floor ms",
        "share",
        "at most ms",
        "met",
        "/ mm + topk",
        "/ cdist + topk",
    )
    made = Table(*headings, title=title)
    for row in rows(lines, records, rates):
        made.add_row(*row)
    return made


def ceilings_of(records: Sequence[Record]) -> dict[str, float]:
    """Return the ceilings that records were judged by."""
    return {name: rate for record in records for name, rate in record.ceilings.items()}


def file_of(gpu: str) -> Path:
    """Return the file of a model of GPU.

    Examples
    --------
    >>> file_of("NVIDIA H100 80GB HBM3").name
    'nvidia-h100-80gb-hbm3.jsonl'
    """
    return runs.RESULTS / f"{re.sub('[^a-z0-9]+', '-', gpu.lower()).strip('-')}.jsonl"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="A GPU beside PyTorch's product and cdist, with targets.")
    parser.add_argument("--output", type=Path, help="records; default results/MODEL.jsonl")
    parser.add_argument("--time", type=float, default=10.0, help="seconds for each backend on each case")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a file's newest run, and stop")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        if given.show:
            records = runs.newest(read_records(given.show))
            console.print(table(targets(), records, ceilings_of(records), runs.title(records, given.show)))
            return
        names = backends_on("cuda")
        lines = targets()
        gpu = describe_machine()["gpus"][0]["name"]
        plan = Plan(names, list({line.case.name: line.case for line in lines}.values()), given.time, twins=False)
        ceilings = Ceilings(plan.threads)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=1.0)
            rates = {}
            for ceiling in ceilings.measure(name for name, probe in PROBES.items() if probe.device == "cuda"):
                progress.update(bar, description=f"ceilings of {gpu}: {ceiling.name}")
                if ceiling.rate is not None:
                    rates[ceiling.name] = ceiling.rate
            output = given.output or file_of(gpu)
            records = runs.run(
                plan, output, ceilings, lambda text, done: progress.update(bar, completed=done, description=text)
            )
    except KnnbenchError as error:
        raise SystemExit(f"python -m benchmarks.gpu: {error}") from None
    console.print(table(lines, records, rates, runs.title(records, output)))


if __name__ == "__main__":
    main()
