"""The command line: ``knnbench``.

Exit codes: 0, all that was asked for was measured and is right; 1, something of it was not (a wrong answer, a
crash, a time-out, or a backend that was named and does not work here); 2, the command line or the data are not
as they should be; 130, interrupted by Ctrl-C, with all that was measured until then shown and kept.
"""

import fnmatch
import itertools
import json
import signal
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NamedTuple

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

import knnbench
from knnbench import datasets
from knnbench.api import check_k
from knnbench.backends import backends as backend_statuses
from knnbench.backends import backends_on, registry
from knnbench.cli_report import OUTPUT, print_bars
from knnbench.cli_report import add_commands as add_report_commands
from knnbench.cli_selection import INTERRUPTED, add_commands
from knnbench.dtypes import COMPUTED
from knnbench.errors import DatasetError, InvalidInputError, KnnbenchError, UnknownBackendError
from knnbench.measure import OPS, Case, Journal, Plan, make_cases, measure
from knnbench.measure.ceilings import PROBES, Ceilings
from knnbench.measure.comparison import ALPHA, MIN_CHANGE, compare_sides, parse_side
from knnbench.metrics import METRICS, get_metric
from knnbench.report.summaries import panels_of
from knnbench.report.table import absent_table, backends_table, case_table, datasets_table
from knnbench.results import Record, read_records
from knnbench.selection import Problem, choose
from knnbench.threads import thread_count

__all__ = ["app", "main"]

app = typer.Typer(add_completion=False, no_args_is_help=False, pretty_exceptions_enable=False)
data_app = typer.Typer(no_args_is_help=True, help="The data sets: what is there, and fetching what is not.")
app.add_typer(data_app, name="data")
add_report_commands(app)
add_commands(app)

ASV_RESULTS = Path(".asv/results")
DEFAULT_METRICS = "cityblock,euclidean"
DEFAULT_TIME_S = 45.0
DEFAULT_K = (3,)
DEVICES = ("cpu", "cuda")
FAILED = 1
INVALID = 2

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
        str,
        typer.Option(
            help="mnist, digits, synthetic or synthetic:KIND, or several of them; default mnist if it is here, else "
            f"digits. Kinds made to be hard: {', '.join(datasets.ADVERSARIAL_KINDS)}."
        ),
    ] = "",
    dtype: Annotated[
        str, typer.Option(help="Convert the data to uint8, float32, float64, or several of them; default as they are.")
    ] = "",
    op: Annotated[str, typer.Option(help=f"{', '.join(OPS)}, or several of them.")] = next(iter(OPS)),
    k: Annotated[
        list[int] | None, typer.Option("--k", "-k", min=1, help="Neighbours of each query; may be given repeatedly.")
    ] = None,
    n_queries: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="Queries, at the most 10,000 if not given; repeatedly for several sizes. Slow backends take fewer. "
            "Of random-search: iterations, 1,000 if not given.",
        ),
    ] = None,
    n_corpus: Annotated[
        list[int] | None, typer.Option(min=1, help="Corpus rows, repeatedly for several sizes; default all.")
    ] = None,
    n_features: Annotated[
        list[int] | None, typer.Option(min=1, help="Of synthetic data, repeatedly for several sizes.")
    ] = None,
    only: Annotated[str, typer.Option(help="Only cases whose name matches, such as '*/cosine/*'; see --list.")] = "",
    threads: Threads = None,
    device: Annotated[
        str, typer.Option(help="Only backends of cpu or cuda; of cuda, what the device can do is measured first.")
    ] = "",
    time: Annotated[
        float, typer.Option(min=0.1, help="Seconds for all calls together; starting and preparing come on top.")
    ] = DEFAULT_TIME_S,
    seed: Annotated[int, typer.Option(min=0, help="Of the order in which cases and backends take turns.")] = 0,
    twins: Annotated[bool, typer.Option(help="Whether to measure the fastest twice, for the noise.")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do not go on with an interrupted run.")] = False,
    list_cases: Annotated[bool, typer.Option("--list", help="Print the names of the cases and stop.")] = False,
    output: Annotated[Path, typer.Option("--output", "-o", help="Append the records to this file.")] = OUTPUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print the records as JSON lines instead of tables.")] = False,
) -> None:
    """Measure backends x cases: time, rate, error and memory of each.

    The same command goes on with a run that was interrupted.
    """
    chosen = dataset or datasets.best_available()
    sizes = Sizes(k or DEFAULT_K, n_queries or (None,), n_corpus or (None,), n_features or (None,))
    cases = _cases(chosen, metrics, dtype, op, sizes, only)
    if list_cases:
        for case in cases:
            print(case.name)
        return
    names = _on_device(_backend_names(backends), device, named=bool(backends))
    plan = Plan(
        backends=names,
        cases=cases,
        case_s=time / (len(names) * len(cases)),
        threads=threads or thread_count(),
        seed=seed,
        twins=twins,
    )
    records: list[Record] = []
    interrupted, failure = False, None
    with Journal(output, plan, fresh=fresh) as journal, _bar() as bar:
        if journal.earlier:
            err.print(f"going on with the run of {journal.earlier[0].started}", style="dim")
        records += [record for record in journal.earlier if record.complete]
        task = bar.add_task("starting", total=1.0)
        ceilings = Ceilings(plan.threads)
        if device == "cuda":
            for ceiling in ceilings.measure(name for name, probe in PROBES.items() if probe.device == device):
                bar.update(task, description=f"ceilings of this device: {ceiling.name}")
        updates = measure(plan, journal.earlier, ceilings)
        try:
            for update in updates:
                bar.update(task, description=update.running, completed=update.done)
                complete = [record for record in update.records if record.complete]
                records += complete
                journal.take(update.records)
                for record in complete if as_json else ():
                    print(record.to_json(), flush=True)
            journal.finish()
        except KeyboardInterrupt:
            interrupted = True
        except OSError as error:
            failure = error
        finally:
            updates.close()
        records += journal.partial
    if not as_json:
        _show(records, plan)
        if chosen == "digits" and not dataset:
            err.print("Measured on digits, a small set. For MNIST: knnbench data fetch mnist", style="dim")
    if failure is not None:
        if not as_json:
            for record in records:
                print(record.to_json())
        err.print(
            f"records cannot be written to {output}: {failure.strerror}; they were printed to standard output instead",
            style="red",
        )
        raise typer.Exit(FAILED)
    err.print(f"{sum(record.complete for record in records)} records in {output}", style="dim")
    if interrupted:
        err.print("interrupted; what was measured is kept, and the same command goes on", style="yellow")
        raise typer.Exit(INTERRUPTED)
    allowed = ("ok",) if backends else HARMLESS
    if any(record.status not in allowed for record in records):
        raise typer.Exit(FAILED)


@app.command()
def machine(
    probes: Annotated[str, typer.Option(help="Names, separated by commas; default all.")] = "",
    threads: Threads = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Show what this machine is, and measure what it can do at best."""
    from knnbench.measure.machine import describe_machine
    from knnbench.report.table import ceilings_table, machine_table

    names = _required(probes, "--probes") if probes else None
    measured = []
    ceilings = Ceilings(threads or thread_count()).measure(names)
    with err.status("measuring") as status:
        for ceiling in ceilings:
            measured.append(ceiling)
            status.update(f"measuring; {ceiling.name} is known")
    facts = describe_machine()
    if as_json:
        rates = {ceiling.name: asdict(ceiling) for ceiling in measured}
        print(json.dumps({"machine": facts, "threads": threads or thread_count(), "ceilings": rates}))
        return
    out.print(machine_table(facts, threads or thread_count()), "")
    out.print(ceilings_table(measured))


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="What to compare with: a side, as above.")],
    b: Annotated[str, typer.Argument(metavar="B", help="What is compared.")],
    results: Annotated[Path, typer.Option(help="The file that a side without a path is taken from.")] = OUTPUT,
    alpha: Annotated[float, typer.Option(min=1e-9, max=0.5, help="Chance of calling noise a difference.")] = ALPHA,
    min_change: Annotated[float, typer.Option(min=0.0, help="Least relative change to speak of.")] = MIN_CHANGE,
) -> None:
    """Compare two sets of records, case by case; exit with 1 if B is slower, broken or less accurate.

    A side is a file; or FIELD=VALUE[,...] of the file that --results names; or PATH@FIELD=VALUE[,...]. Fields are
    backend, commit, machine, run, threads, dtype, metric, op, dataset, k and version:

    knnbench compare before.jsonl after.jsonl

    knnbench compare commit=1a2b3c commit=4d5e6f

    knnbench compare backend=numpy,dtype=float32 backend=numba,dtype=float32
    """
    from knnbench.report.comparison import comparison_table

    comparison = compare_sides(parse_side(a, results), parse_side(b, results), alpha=alpha, min_change=min_change)
    out.print(comparison_table(comparison))
    if comparison.regressions:
        raise typer.Exit(FAILED)


@app.command(name="export-asv")
def export_asv(
    results: Annotated[list[Path], typer.Argument(help="Files of records.")],
    results_dir: Annotated[Path, typer.Option(help="results_dir of asv.conf.json.")] = ASV_RESULTS,
    machine_name: Annotated[
        str, typer.Option("--machine", help="What asv is to call the machine; default from its CPU.")
    ] = "",
) -> None:
    """Write records into asv's results, so that `asv publish` shows them beside its own. Do it after `asv run`."""
    from knnbench.report.asv import export

    records = [record for path in results for record in read_records(path)]
    exported = export(records, results_dir, machine_name or None)
    for name, reason in exported.refused:
        err.print(f"left out: {name}: {reason}", style="yellow", markup=False)
    for path in exported.paths:
        out.print(str(path), soft_wrap=True, markup=False)
    if not exported.paths:
        raise InvalidInputError("nothing was exported: no record is ok, complete and of a clean commit.")


@app.command(name="backends")
def list_backends() -> None:
    """List every backend: whether it works here, on what device, and how to get it."""
    with err.status("computing with each backend"):
        statuses = backend_statuses()
    out.print(backends_table(statuses))


@app.command()
def reproduce(
    backends: Backends = "",
    every: Annotated[bool, typer.Option("--all", help="All own backends that take less than an hour.")] = False,
    threads: Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="The first of ten of the random search.")] = 0,
    search: Annotated[bool, typer.Option(help="Whether to run the random search too.")] = True,
) -> None:
    """Do again what the notebook did on MNIST that knnbench grew out of, and show both results."""
    from knnbench.measure.process import WorkerEnded
    from knnbench.measure.reproduction import NOTEBOOK, SEARCH_SEEDS, classify, random_search
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
    found: list[dict[str, float]] = []
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
                task = bar.add_task("random search", total=SEARCH_SEEDS)
                try:
                    for result in random_search(range(seed, seed + SEARCH_SEEDS), count):
                        found.append(result)
                        bar.update(task, completed=len(found))
                except WorkerEnded as ended:
                    search_reason = str(ended)
        except KeyboardInterrupt:
            interrupted = True
    out.print(reproduction_table(rows, count), "")
    if found:
        out.print(search_table(found))
    if search_reason:
        err.print(f"random search: {search_reason}", style="red", markup=False)
    if interrupted:
        raise typer.Exit(INTERRUPTED)
    if search_reason or any(row.is_wrong or row.failed or (row.reason and backends) for row in rows):
        raise typer.Exit(FAILED)


@data_app.command()
def info() -> None:
    """Show each data set: where it is, its shape, or how to get it."""
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
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
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


def _on_device(names: list[str], device: str, *, named: bool) -> list[str]:
    """Return those of the backends that compute on a device, all of them if none is asked for."""
    if not device:
        return names
    if device not in DEVICES:
        raise InvalidInputError(f"--device is {device!r}; expected one of: {', '.join(DEVICES)}.")
    found = backends_on(device)
    others = [name for name in names if name not in found]
    if others and named:
        raise InvalidInputError(f"not of device {device}: {', '.join(others)}; leave out --device or these.")
    return [name for name in names if name in found]


def _metric_names(text: str) -> list[str]:
    """Return the canonical names of the metrics named."""
    names = METRICS if text == "all" else (get_metric(name).name for name in _required(text, "--metrics"))
    return list(dict.fromkeys(names))


class Sizes(NamedTuple):
    """The sizes of the cases asked for, each with each; None is as the data set has it."""

    k: Sequence[int]
    n_queries: Sequence[int | None]
    n_corpus: Sequence[int | None]
    n_features: Sequence[int | None]


def _cases(names: str, metrics: str, dtypes: str, ops: str, sizes: Sizes, only: str) -> list[Case]:
    """Return the cases asked for, if the data sets are here and what is asked for can be done with them."""
    chosen_dtypes = _known(dtypes, COMPUTED, "--dtype") if dtypes else [""]
    chosen_ops = _known(ops, OPS, "--op")
    found: dict[str, Case] = {}
    for name in _required(names, "--dataset"):
        is_synthetic = _check_dataset(name, chosen_dtypes, sizes) == "synthetic"
        for k, n_queries, n_corpus, n_features in itertools.product(*sizes):
            options = {"n_train": n_corpus, "n_features": n_features}
            if is_synthetic:
                options["n_test"] = n_queries
            cases = make_cases(
                name,
                _metric_names(metrics),
                ops=chosen_ops,
                dtypes=chosen_dtypes,
                k=k,
                n_queries=n_queries,
                options={option: value for option, value in options.items() if value is not None},
            )
            for case in cases:
                check_k(case.k or 1, case.n_corpus)
                found.setdefault(case.name, case)
    chosen = [case for case in found.values() if not only or fnmatch.fnmatchcase(case.name, only)]
    if not chosen:
        raise InvalidInputError(f"no case matches {only!r}; there are: {', '.join(found)}.")
    return chosen


def _check_dataset(name: str, dtypes: Sequence[str], sizes: Sizes) -> str:
    """Return a data set's name without its kind, if it is here and can be of the dtypes and sizes asked for."""
    statuses = {status.name: status for status in datasets.status()}
    family, colon, kind = name.partition(":")
    if family not in statuses or (colon and family != "synthetic"):
        raise InvalidInputError(
            f"data set {name!r} is unknown; expected one of: {', '.join(statuses)}, or synthetic:KIND."
        )
    if not statuses[family].available:
        raise DatasetError(statuses[family].reason)
    for dtype in dtypes if kind else ():
        if dtype and dtype not in (allowed := datasets.synthetic_dtypes(kind)):
            raise InvalidInputError(f"{name} cannot be {dtype}; expected one of: {', '.join(allowed)}.")
    if colon:
        datasets.synthetic_dtypes(kind)
    if family != "synthetic" and sizes.n_features != (None,):
        raise InvalidInputError(f"{name} has features of its own; --n-features is for synthetic data.")
    return family


def _known(text: str, known: Collection[str], option: str) -> list[str]:
    """Return the names in a list separated by commas, all of which are known."""
    names = _required(text, option)
    for name in names:
        if name not in known:
            raise InvalidInputError(f"{name!r} is not measured; expected one of: {', '.join(known)}.")
    return names


def _show(records: list[Record], plan: Plan) -> None:
    """Print what was measured, a table for each case."""
    for case in plan.cases:
        rows = [record for record in records if record.case == case.name and record.status != "absent"]
        if rows:
            out.print(case_table(rows), "")
    absent = absent_table(records)
    if absent is not None:
        out.print(absent, "")
    if any(record.times_s for record in records):
        print_bars(out, panels_of(records))


def _fastest() -> str:
    """Return the backend that ``backend="auto"`` takes for MNIST."""
    name, _ = choose(Problem("knn", 10_000, 60_000, 784, 3, "cityblock", "uint8", accuracy="exact"))
    return name
