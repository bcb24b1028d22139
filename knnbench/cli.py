"""The command line: ``knnbench``.

Exit codes: 0, all that was asked for was measured and is right; 1, something of it was not (a wrong answer, a
crash, a time-out, or a backend that was named and does not work here); 2, the command line or the data are not
as they should be; 130, interrupted by Ctrl-C, with all that was measured until then shown and kept.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

import knnbench
from knnbench import datasets
from knnbench.api import check_k
from knnbench.backends import backends as backend_statuses
from knnbench.backends import registry
from knnbench.dtypes import COMPUTED
from knnbench.errors import DatasetError, InvalidInputError, KnnbenchError, UnknownBackendError
from knnbench.metrics import METRICS, Space, get_metric
from knnbench.selection import choose
from knnbench.threads import thread_count

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="The data sets: what is there, and fetching what is not.")
app.add_typer(data_app, name="data")

OUTPUT = Path("knnbench-results.jsonl")
DEFAULT_METRICS = "cityblock,euclidean"
DEFAULT_TIME_S = 45.0
FAILED = 1
INVALID = 2
INTERRUPTED = 130

# Cells that say nothing against a backend, unless it was asked for by name.
HARMLESS = ("ok", "absent", "unsupported")

# The table goes to standard output, what happens meanwhile to standard error. A table in a file or a pipe is
# as wide as it has to be.
out = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
err = Console(stderr=True, highlight=False)

Backends = Annotated[str, typer.Option(help="Names, separated by commas; default all (for reproduce: the fastest).")]
Threads = Annotated[
    int | None, typer.Option(min=1, help="Threads of each backend; default $KNNBENCH_THREADS or all CPUs.")
]


def main() -> None:
    """Run the command line; the errors that knnbench raises on purpose become a line and an exit code."""
    for name in ("SIGTERM", "SIGHUP"):  # so that the process that is measuring is ended too
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), lambda number, _: sys.exit(128 + number))
    try:
        app()
    except KnnbenchError as error:
        err.print(f"knnbench: {error}", style="red", markup=False)
        raise SystemExit(INVALID) from None


@app.callback(invoke_without_command=True)
def default(
    context: typer.Context, version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False
) -> None:
    """Compare exact distance kernels and brute-force KNN on this machine. Without a command: run."""
    if version:
        out.print(f"knnbench {knnbench.__version__}")
    elif context.invoked_subcommand is None:
        run()


@app.command()
def run(
    backends: Backends = "",
    metrics: Annotated[str, typer.Option(help="Names, separated by commas, or 'all'.")] = DEFAULT_METRICS,
    dataset: Annotated[
        str, typer.Option(help="mnist, digits or synthetic; default mnist if it is here, else digits.")
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Convert the data to uint8, float32 or float64; default as they are.")
    ] = "",
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Neighbours of each query.")] = 3,
    n_queries: Annotated[
        int, typer.Option(min=1, help="Queries at the most; slow backends are measured on fewer.")
    ] = 10_000,
    threads: Threads = None,
    time: Annotated[
        float, typer.Option(min=0.1, help="Seconds for all calls together; starting and preparing come on top.")
    ] = DEFAULT_TIME_S,
    output: Annotated[Path, typer.Option("--output", "-o", help="Append the records to this file.")] = OUTPUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines instead of tables.")] = False,
) -> None:
    """Measure backends x metrics: time, rate, error and memory of each."""
    from knnbench.measure import Plan, Record, append_record, measure
    from knnbench.report.table import absent_table, metric_table

    names = _backend_names(backends)
    metric_names = _metric_names(metrics)
    chosen = dataset or datasets.best_available()
    n_corpus = _check_data(chosen, dtype, k)
    _check_writable(output)
    plan = Plan(
        backends=names,
        metrics=metric_names,
        dataset=chosen,
        dtype=dtype,
        k=k,
        n_queries=n_queries,
        case_s=time / (len(names) * len(metric_names)),
        threads=threads or thread_count(),
    )
    records: list[Record] = []
    interrupted = False
    with _bar() as bar:
        task = bar.add_task("starting", total=len(plan.backends) * len(plan.metrics))
        cells = measure(plan)
        try:
            bar.update(task, description=f"{plan.backends[0]}")
            for record in cells:
                append_record(output, record)
                records.append(record)
                if as_json:
                    print(record.to_json(), flush=True)
                place = len(records) // len(plan.metrics)
                bar.update(task, advance=1, description=plan.backends[min(place, len(plan.backends) - 1)])
        except KeyboardInterrupt:
            interrupted = True
        finally:
            cells.close()
    if not as_json:
        for metric in plan.metrics:
            rows = [record for record in records if record.metric == metric and record.status != "absent"]
            if rows:
                out.print(metric_table(rows, n_corpus), "")
        absent = absent_table(records)
        if absent is not None:
            out.print(absent)
        if chosen == "digits" and not dataset:
            err.print("Measured on digits, a small set. For MNIST: knnbench data fetch mnist", style="dim")
    if records:
        err.print(f"{len(records)} records appended to {output}", style="dim")
    if interrupted:
        err.print("interrupted; what was measured is kept", style="yellow")
        raise typer.Exit(INTERRUPTED)
    allowed = ("ok",) if backends else HARMLESS
    if any(record.status not in allowed for record in records):
        raise typer.Exit(FAILED)


@app.command(name="backends")
def list_backends() -> None:
    """List every backend: whether it works here, on what device, and how to get it."""
    from knnbench.report.table import backends_table

    with err.status("computing with each backend"):
        statuses = backend_statuses()
    out.print(backends_table(statuses))


@app.command()
def reproduce(
    backends: Backends = "",
    every: Annotated[bool, typer.Option("--all", help="All own backends that take less than an hour.")] = False,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the random search.")] = 0,
    search: Annotated[bool, typer.Option(help="Whether to run the random search too.")] = True,
) -> None:
    """Do again what the notebook did on MNIST that knnbench grew out of, and show both results."""
    from knnbench.measure.process import WorkerEnded
    from knnbench.measure.reproduction import NOTEBOOK, classify, random_search
    from knnbench.report.reproduction import ClassificationRow, reproduction_table, search_table

    datasets.load("mnist", n_train=1, n_test=1)  # says how to get it
    if backends:
        names = _backend_names(backends)
    elif every:
        names = [status.name for status in backend_statuses() if status.ok and not status.peer]
    else:
        names = [_fastest()]
    count = threads or thread_count()
    rows: list[ClassificationRow] = []
    found: dict[str, float] | None = None
    search_reason = ""
    interrupted = False
    with _bar() as bar:
        try:
            for metric in NOTEBOOK:
                for name in names:
                    task = bar.add_task(f"{metric}, {name}", total=10_000)
                    row = ClassificationRow(name, metric)
                    rows.append(row)
                    try:
                        for progress in classify(name, metric, count):
                            row.take(progress)
                            bar.update(task, completed=progress.done)
                    except WorkerEnded as ended:
                        row.reason, row.failed = str(ended), True
            if search:
                bar.add_task("random search", total=None)
                try:
                    found = next(random_search(seed, count))
                except (WorkerEnded, StopIteration) as ended:
                    search_reason = str(ended) or "the process ended before its answer"
        except KeyboardInterrupt:
            interrupted = True
    out.print(reproduction_table(rows, count), "")
    if found is not None:
        out.print(search_table(found, seed))
    if search_reason:
        err.print(f"random search: {search_reason}", style="red", markup=False)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if search_reason or any(row.is_wrong or row.failed or (row.reason and backends) for row in rows):
        raise typer.Exit(FAILED)


@data_app.command()
def info() -> None:
    """Show each data set: where it is, its shape, or how to get it."""
    from knnbench.report.table import datasets_table

    out.print(datasets_table(datasets.status()))


@data_app.command()
def fetch(name: Annotated[str, typer.Argument(help="The data set: mnist.")]) -> None:
    """Download a data set, verify it and keep it in the cache."""
    if name != "mnist":
        raise InvalidInputError(
            f"data set {name!r} cannot be fetched; expected mnist (digits and synthetic need not be)."
        )
    out.print(f"mnist is in {datasets.fetch_mnist()}", soft_wrap=True)


@contextmanager
def _bar() -> Iterator[Progress]:
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err) as progress:
        yield progress


def _required(text: str, option: str) -> list[str]:
    """Return the names in a list separated by commas, at least one."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InvalidInputError(f"{option} is {text!r}; expected names separated by commas.")
    return names


def _backend_names(text: str) -> list[str]:
    """Return the backends named, or all; the names are checked here, whether they work by the run."""
    if not text:
        return list(registry())
    names = _required(text, "--backends")
    for name in names:
        if name not in registry():
            raise UnknownBackendError(f"backend {name!r} is unknown; expected one of: {', '.join(registry())}.")
    return list(dict.fromkeys(names))


def _metric_names(text: str) -> list[str]:
    """Return the canonical names of the metrics named."""
    names = METRICS if text == "all" else (get_metric(name).name for name in _required(text, "--metrics"))
    return list(dict.fromkeys(names))


def _check_data(dataset: str, dtype: str, k: int) -> int:
    """Return the rows of a data set's corpus, if what is asked for can be done with it."""
    statuses = {status.name: status for status in datasets.status()}
    if dataset not in statuses:
        raise InvalidInputError(f"data set {dataset!r} is unknown; expected one of: {', '.join(statuses)}.")
    if not statuses[dataset].available:
        raise DatasetError(statuses[dataset].reason)
    if dtype and dtype not in COMPUTED:
        raise InvalidInputError(f"dtype {dtype!r} is not measured; expected one of: {', '.join(COMPUTED)}.")
    n_corpus = statuses[dataset].train_shape[0]
    check_k(k, n_corpus)
    return n_corpus


def _check_writable(path: Path) -> None:
    """Refuse a file that records could not be appended to, before anything is measured."""
    try:
        path.open("a").close()
    except OSError as error:
        raise InvalidInputError(
            f"records cannot be written to {path}: {error.strerror}; name another with --output."
        ) from None


def _fastest() -> str:
    """Return the backend that ``backend="auto"`` takes for MNIST."""
    name, _ = choose(Space(METRICS["cityblock"], np.dtype(np.uint8), 784), "exact", "cpu")
    return name
