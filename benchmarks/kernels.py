"""The CPU kernels of the numba backend beside faiss and scikit-learn, in turns, as a table.

Run it as ``python -m benchmarks.kernels`` from a checkout with the peers installed (``pip install -e '.[peers]'``) and
MNIST there (``knnbench data fetch mnist``); it takes about ten minutes. Answers are checked, and records are appended
to ``results/kernels.jsonl``, by the same runner as ``knnbench run``: after an interruption the same command goes on,
and ``--show FILE`` prints the newest run of a file again, whatever machine it is of.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from knnbench import KnnbenchError
from knnbench.measure import Case, Plan, make_cases
from knnbench.measure.ceilings import Ceilings
from knnbench.results import Record, read_records

from . import runs

BACKEND = "numba"
PEERS = ("faiss", "sklearn")

# Of the table where no terminal says its own.
WIDTH = 132

# Of MNIST's shape, but on no grid: bytes stand for such rows less well than for pixels.
CLUSTERS = {"n_train": 60_000, "n_test": 1000, "n_features": 784}
PLANE = {"n_train": 10_000, "n_test": 10_000, "n_features": 2}


def cases() -> list[Case]:
    """Return the cases of the table, in its order."""
    return [
        *make_cases("mnist", ["cityblock", "euclidean"], dtypes=["uint8"]),
        *make_cases("mnist", ["cityblock", "chebyshev", "euclidean"], dtypes=["float32"]),
        *make_cases("mnist", ["cityblock", "euclidean"], dtypes=["float64"]),
        *make_cases("synthetic", ["cityblock", "euclidean"], dtypes=["float32"], options=CLUSTERS),
        *make_cases("mnist", ["cityblock", "euclidean"], dtypes=["uint8"], n_queries=1),
        *make_cases("synthetic", ["euclidean"], dtypes=["float32"], options=PLANE),
    ]


def limit(record: Record) -> str:
    """Return which ceiling, of the machine that measured it, a kernel is nearest to, and how near."""
    assert record.seconds_per_pair is not None
    shares = []
    if record.fraction_of_floor is not None:
        shares.append((record.fraction_of_floor, record.bound))
    # Many queries share what is read of the corpus; a single one reads all of it.
    read = record.ceilings.get("read") if record.n_queries == 1 else None
    if read is not None:
        itemsize = 1 if record.dtype == "uint8" else 4
        shares.append((itemsize / read / record.seconds_per_pair, "read"))
    return "{:.0%} of {}".format(*max(shares)) if shares else ""


def rows(records: Sequence[Record]) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table."""
    for case in cases():
        cells = {record.backend: record for record in records if record.case == case.name and not record.twin}
        own = cells.get(BACKEND)
        if own is None or own.seconds_per_pair is None or own.median_s is None or own.interval_s is None:
            yield case.name, f"{own.status}: {own.reason}" if own else "not measured"
            continue
        query_s = own.seconds_per_pair * own.n_corpus * own.n_features
        spread = (own.interval_s[1] - own.interval_s[0]) / 2 / own.median_s
        ratios = []
        for name in PEERS:
            peer = cells.get(name)
            pair_s = None if peer is None else peer.seconds_per_pair
            ratios.append("" if pair_s is None else f"{pair_s / own.seconds_per_pair:.3g}")
        yield case.name, f"{query_s * 1e3:.3g} ± {spread:.0%}", *ratios, limit(own), own.status


def table(records: Sequence[Record], path: Path) -> Table:
    """Return the table of one run."""
    made = Table("case", "ms a query", *(f"x {name}" for name in PEERS), "limit", "answers")
    made.title = runs.title(records, path)
    for column in made.columns:
        column.no_wrap = True
    for row in rows(records):
        made.add_row(*row)
    return made


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description="The numba backend's kernels beside faiss and scikit-learn.")
    parser.add_argument(
        "--output", type=Path, default=runs.RESULTS / "kernels.jsonl", help="records are appended to it"
    )
    parser.add_argument("--time", type=float, default=10.0, help="seconds for each backend on each case")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a file's newest run, and stop")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    try:
        if given.show:
            console.print(table(runs.newest(read_records(given.show)), given.show))
            return
        plan = Plan((BACKEND, *PEERS), cases(), case_s=given.time, twins=False)
        with Progress(console=Console(stderr=True)) as progress:
            bar = progress.add_task("", total=1.0)
            records = runs.run(
                plan,
                given.output,
                Ceilings(plan.threads),
                lambda text, done: progress.update(bar, completed=done, description=text),
            )
    except KnnbenchError as error:
        raise SystemExit(f"python -m benchmarks.kernels: {error}") from None
    console.print(table(records, given.output))


if __name__ == "__main__":
    main()
