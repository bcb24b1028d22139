"""The commands of ``knnbench`` that choose a backend, and that measure what choosing needs."""

import json
from dataclasses import asdict, replace
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from knnbench.api import check_accuracy
from knnbench.errors import InvalidInputError
from knnbench.selection.choice import Choice, fastest_backend
from knnbench.selection.wisdom import wisdom, wisdom_path

__all__ = ["INTERRUPTED", "add_commands"]

wisdom_app = typer.Typer(
    no_args_is_help=True, help="What was measured on this machine, from which backends are chosen."
)

INTERRUPTED = 130

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(fastest)
    app.command()(calibrate)
    app.command()(regret)
    app.command()(plan)
    app.add_typer(wisdom_app, name="wisdom")


def fastest(
    n_queries: Annotated[int, typer.Option(min=1)],
    n_corpus: Annotated[int, typer.Option(min=1)],
    n_features: Annotated[int, typer.Option(min=1)],
    k: Annotated[int | None, typer.Option("--k", "-k", min=1, help="Neighbours of each query, for knn.")] = None,
    op: Annotated[str, typer.Option(help="knn or pairwise.")] = "knn",
    metric: Annotated[str, typer.Option()] = "euclidean",
    dtype: Annotated[str, typer.Option(help="Of the data.")] = "float32",
    accuracy: Annotated[str, typer.Option(help="fast or exact.")] = "fast",
    max_error: Annotated[float | None, typer.Option(help="The largest error allowed, on adversarial data too.")] = None,
    calls: Annotated[int, typer.Option(min=1, help="With one corpus; a start is counted once.")] = 1,
    data_on: Annotated[str, typer.Option(help="host or device.")] = "host",
    memory_budget: Annotated[int | None, typer.Option(help="Bytes.")] = None,
    candidates: Annotated[str, typer.Option(help="Names, separated by commas; default all.")] = "",
    effort: Annotated[str, typer.Option(help="estimate, measure or exhaustive.")] = "measure",
    time: Annotated[float, typer.Option(min=0.01, help="Seconds that measuring may take.")] = 1.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say which backend is the fastest for a shape on this machine, and why."""
    choice = fastest_backend(
        op, n_queries=n_queries, n_corpus=n_corpus, n_features=n_features, k=k, metric=metric, dtype=dtype,
        accuracy=accuracy, max_error=max_error, calls=calls, data_on=data_on, memory_budget=memory_budget,
        candidates=[name.strip() for name in candidates.split(",")] if candidates else None, effort=effort,
        time_budget=time,
    )  # fmt: skip
    if as_json:
        print(json.dumps({name: value for name, value in asdict(choice).items() if not name.startswith("_")}))
        return
    _show(choice)


def _show(choice: Choice) -> None:
    out.print(str(choice), markup=False, soft_wrap=True)


def calibrate(
    full: Annotated[bool, typer.Option("--full", help="Half an hour instead of a minute.")] = False,
    backends: Annotated[str, typer.Option(help="Names, separated by commas; default all that work.")] = "",
    time: Annotated[float | None, typer.Option(min=1, help="Seconds, beside starting backends.")] = None,
) -> None:
    """Measure all backends on shapes of all sizes, so that choosing by estimate holds on this machine."""
    from knnbench.selection.calibration import FULL, QUICK
    from knnbench.selection.calibration import calibrate as measure_all

    level = FULL if full else QUICK
    level = replace(level, seconds=time) if time else level
    names = [name.strip() for name in backends.split(",")] if backends else None
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("starting", total=1.0)
        try:
            for progress in measure_all(level, names):
                bar.update(task, description=progress.what, completed=progress.done)
        except KeyboardInterrupt:
            err.print("interrupted; what was measured is kept", style="yellow")
            raise typer.Exit(INTERRUPTED) from None
    out.print(f"wisdom is in {wisdom_path()}", soft_wrap=True, markup=False)


def regret(
    n: Annotated[int, typer.Option("--n", min=2, help="Problems.")] = 60,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems, and of the order of the rounds.")] = 0,
    time: Annotated[float, typer.Option(min=0.0, help="Seconds of effort='measure'; 0 to leave it out.")] = 1.0,
    accuracy: Annotated[str, typer.Option(help="fast or exact.")] = "fast",
    as_json: Annotated[bool, typer.Option("--json", help="Print the outcomes as JSON lines instead.")] = False,
) -> None:
    """Judge the choices: the time of what was chosen over that of the best, on shapes that were never measured."""
    from knnbench.selection.regret import outcomes, problems, summaries

    asked = [replace(problem, accuracy=check_accuracy(accuracy)) for problem in problems(n, seed)]
    found = []
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=err) as bar:
        task = bar.add_task("measuring", total=len(asked))
        for outcome in outcomes(asked, time, seed):
            found.append(outcome)
            bar.update(task, description=str(outcome.problem), advance=1)
            if as_json:
                print(json.dumps(asdict(outcome)), flush=True)
    if as_json:
        return
    table = Table(title=f"regret over {len(found)} problems, seed {seed}", title_justify="left", title_style="bold")
    for heading in ("chosen by", "geometric mean", "95th percentile", "worst", "best or within 2 %"):
        table.add_column(heading, justify="left" if heading == "chosen by" else "right")
    for row in summaries(found):
        figures = f"{row.geometric_mean:.3f}", f"{row.percentile_95:.2f}", f"{row.worst:.2f}", f"{row.best_share:.0%}"
        table.add_row(row.name, *figures)
    out.print(table)


def _whole(text: str) -> int:
    """Return a whole number, which may be written as 1e9 or 1_000_000."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if value != int(value):
        raise typer.BadParameter(f"{text!r} is no whole number; write 1000000 or 1e6.")
    return int(text) if text.isdecimal() else int(value)


def plan(
    n_queries: Annotated[int, typer.Option(parser=_whole, metavar="N")],
    n_corpus: Annotated[int, typer.Option(parser=_whole, metavar="N")],
    n_features: Annotated[int, typer.Option(parser=_whole, metavar="N")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Neighbours of each query.")] = 10,
    metric: Annotated[str, typer.Option()] = "euclidean",
    dtype: Annotated[str, typer.Option(help="Of the data.")] = "float32",
    accuracy: Annotated[str, typer.Option(help="fast or exact.")] = "fast",
    backend: Annotated[str, typer.Option(help="That computes; auto takes the fastest by estimate.")] = "auto",
    workers: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Of each process; as many tasks run at a time.")] = 1,
    network_rate: Annotated[float, typer.Option(help="Bytes a second between two workers.")] = 1.25e9,
    scheduler: Annotated[str, typer.Option(help="Address of a Dask scheduler: measure its network.")] = "",
    shard_rows: Annotated[int | None, typer.Option(parser=_whole, metavar="N", help="Instead of the best.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a search on a cluster will take: time, memory of a worker, bytes moved, and the shards to choose.

    Workers are taken to be like this machine, whose costs `knnbench calibrate` measures.
    """
    from knnbench import scaling

    if scheduler:
        try:
            from distributed import Client

            with Client(scheduler, set_as_default=False, timeout="10s") as client:
                network_rate = scaling.network_rate(client)
        except ImportError:
            raise InvalidInputError("--scheduler needs Dask; pip install 'knnbench[distributed]'.") from None
        except (OSError, ValueError) as error:
            raise InvalidInputError(f"no Dask scheduler answers at {scheduler!r}: {error}") from None
    found = scaling.plan(
        n_queries=n_queries, n_corpus=n_corpus, n_features=n_features, k=k, metric=metric, dtype=dtype,
        accuracy=accuracy, backend=backend, workers=workers, threads=threads, network_rate=network_rate,
        shard_rows=shard_rows,
    )  # fmt: skip
    if as_json:
        low, high = found.interval()
        print(json.dumps(asdict(found) | {"seconds": found.seconds, "low_s": low, "high_s": high}))
        return
    out.print(str(found), markup=False, soft_wrap=True)


@wisdom_app.command()
def show() -> None:
    """Show what is known of each backend on each kind of computation."""
    known = wisdom()
    table = Table(title=f"wisdom in {wisdom_path()}", title_justify="left", title_style="bold")
    for heading in ("backend", "op", "metric", "dtype", "data on", "accuracy", "from", "error, adversarial"):
        table.add_column(heading)
    for group in known.groups:
        backend, _, metric, dtype, *_ = group
        error = known.error(backend, metric, dtype)
        table.add_row(*group, known.source(group), f"{error['adversarial']:.1e}" if error else "")
    out.print(table)


@wisdom_app.command()
def check() -> None:
    """Say how much of the wisdom is of the versions installed; exit with 1 if some is not."""
    known = wisdom()
    stale = known.stale
    out.print(f"{len(known.fresh)} measurements of the versions installed, {len(stale)} of others", markup=False)
    for backend, version in sorted({(sample.backend, sample.version) for sample in stale}):
        out.print(f"  {backend}: measured with {version}", markup=False)
    if stale:
        out.print("`knnbench calibrate` measures again")
        raise typer.Exit(1)


@wisdom_app.command()
def clear() -> None:
    """Forget what was measured on this machine; what comes with knnbench stays."""
    path = wisdom_path()
    if not path.exists():
        raise InvalidInputError(f"there is no wisdom of this machine at {path}.")
    path.unlink()
    out.print(f"removed {path}", soft_wrap=True, markup=False)
