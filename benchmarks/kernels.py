"""The CPU kernels of the numba backend beside faiss and scikit-learn, in turns, as a table.

Run it as ``python -m benchmarks.kernels`` from a checkout with the peers installed (``pip install -e '.[peers]'``) and
MNIST there (``knnbench data fetch mnist``); it takes about ten minutes. Answers are checked, and each record is
appended to a file, by the same runner as ``knnbench run``: a case that its file has is not measured again.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from knnbench.measure import Case, Plan, make_cases, measure
from knnbench.measure.ceilings import Ceilings
from knnbench.results import Record, append_record, read_records

BACKEND = "numba"
PEERS = ("faiss", "sklearn")

# Of the table where no terminal says its own.
WIDTH = 132

PLANE = {"n_train": 10_000, "n_test": 10_000, "n_features": 2}


def cases() -> list[Case]:
    """Return the cases of the table, in its order."""
    return [
        *make_cases("mnist", ["cityblock", "euclidean"], dtypes=["uint8"]),
        *make_cases("mnist", ["cityblock", "chebyshev", "euclidean"], dtypes=["float32"]),
        *make_cases("mnist", ["cityblock", "euclidean"], dtypes=["uint8"], n_queries=1),
        *make_cases("synthetic", ["euclidean"], dtypes=["float32"], options=PLANE),
    ]


def limit(record: Record, ceilings: Ceilings) -> str:
    """Return which ceiling a kernel is nearest to, and how near."""
    assert record.seconds_per_pair is not None
    shares = []
    if record.fraction_of_floor is not None:
        shares.append((record.fraction_of_floor, record.bound))
    # Many queries share what is read of the corpus; a single one reads all of it.
    read = ceilings.rate("read") if record.n_queries == 1 else None
    if read is not None:
        itemsize = 1 if record.dtype == "uint8" else 4
        shares.append((itemsize / read / record.seconds_per_pair, "read"))
    return "{:.0%} of {}".format(*max(shares)) if shares else ""


def rows(plan: list[Case], records: list[Record], ceilings: Ceilings) -> Iterator[tuple[str, ...]]:
    """Yield the rows of the table."""
    for case in plan:
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
        yield case.name, f"{query_s * 1e3:.3g} ± {spread:.0%}", *ratios, limit(own, ceilings), own.status


def main() -> None:
    """Measure what is missing, and print the table."""
    parser = argparse.ArgumentParser(description="The numba backend's kernels beside faiss and scikit-learn.")
    parser.add_argument("--output", type=Path, default=Path("kernels.jsonl"), help="records, read and appended to")
    parser.add_argument("--time", type=float, default=10.0, help="seconds for each backend on each case")
    given = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    plan = Plan((BACKEND, *PEERS), cases(), case_s=given.time, twins=False)
    records = read_records(given.output) if given.output.exists() else []
    with Progress(console=Console(stderr=True)) as progress:
        bar = progress.add_task("", total=1.0)
        for update in measure(plan, records):
            progress.update(bar, completed=update.done, description=update.running)
            for record in update.records:
                if record.complete:
                    append_record(given.output, record)
                    records.append(record)
    ceilings = Ceilings(plan.threads)
    threads = f"{plan.threads} thread{'s' if plan.threads != 1 else ''}"
    table = Table("case", "ms a query", *(f"x {name}" for name in PEERS), "limit", "answers", title=threads)
    for column in table.columns:
        column.no_wrap = True
    for row in rows(plan.cases, records, ceilings):
        table.add_row(*row)
    console.print(table)


if __name__ == "__main__":
    main()
