"""The notebook's results beside ours."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from rich.table import Table

from knnbench.measure.reproduction import FIRST_IMAGES, NOTEBOOK, NOTEBOOK_SEARCH, Progress
from knnbench.report.table import format_seconds

__all__ = ["ClassificationRow", "outside_spread", "reproduction_table", "search_table"]

N_TEST = 10_000


@dataclass(slots=True)
class ClassificationRow:
    """One backend on one metric, as far as it got.

    Attributes
    ----------
    backend, metric : str
    progress : Progress or None
        None before the first images.
    reason : str
        Why it did not get to the end; empty if it did.
    failed : bool
        Whether its process died.
    """

    backend: str
    metric: str
    progress: Progress | None = None
    reason: str = ""
    failed: bool = False

    def take(self, progress: Progress) -> None:
        """Take in how far it is now."""
        self.progress = progress
        self.reason = progress.reason

    @property
    def is_complete(self) -> bool:
        """Whether all test images were classified."""
        return self.progress is not None and self.progress.done == N_TEST

    @property
    def is_wrong(self) -> bool:
        """Whether an accuracy that is known differs from the notebook's."""
        if self.progress is None:
            return False
        theirs, ours = NOTEBOOK[self.metric], self.progress
        first_differs = ours.done >= FIRST_IMAGES and ours.first_correct != theirs.first_correct
        return first_differs or (self.is_complete and ours.correct != theirs.all_correct)


def reproduction_table(rows: Iterable[ClassificationRow], threads: int) -> Table:
    """Return accuracies and times of the nearest-neighbour classifier, k = 3, beside the notebook's."""
    table = Table(
        title=f"KNN on MNIST, k=3, {threads} thread{'s' if threads != 1 else ''}",
        title_justify="left",
        title_style="bold",
    )
    for heading in ("metric", "who"):
        table.add_column(heading, no_wrap=True)
    for heading in (f"of {FIRST_IMAGES}", f"of {N_TEST:,}", f"s for {N_TEST:,}", "notebook / ours"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("note", overflow="fold")
    last = ""
    for row in rows:
        theirs = NOTEBOOK[row.metric]
        if row.metric != last:
            cpu_s = theirs.cpu_s * N_TEST / 1000
            first, whole = str(theirs.first_correct), f"{theirs.all_correct:,}"
            table.add_section()
            table.add_row(
                row.metric,
                "notebook, CUDA",
                first,
                whole,
                f"{theirs.cuda_s:.1f}",
                "",
                "a launch per image",
                style="dim",
            )
            table.add_row(row.metric, "notebook, CPU", first, "", f"{cpu_s:,.0f}", "", "from 1,000 images", style="dim")
            last = row.metric
        table.add_row(*_cells(row), style="red" if row.is_wrong else "")
    return table


def _cells(row: ClassificationRow) -> list[str]:
    progress, theirs = row.progress, NOTEBOOK[row.metric]
    if progress is None or not progress.done:
        return [row.metric, row.backend, "", "", "", "", row.reason or "not reached"]
    note = row.reason or ("" if row.is_complete else f"stopped after {progress.done:,} images")
    if row.is_wrong:
        note = f"differs from the notebook. {note}"
    return [
        row.metric,
        row.backend,
        str(progress.first_correct) if progress.done >= FIRST_IMAGES else "",
        f"{progress.correct:,}" if row.is_complete else "",
        f"{progress.seconds:.1f}" if row.is_complete else "",
        f"CUDA {theirs.cuda_s / progress.seconds:.2g}, CPU {10 * theirs.cpu_s / progress.seconds:.3g}"
        if row.is_complete
        else "",
        note,
    ]


def search_table(runs: Sequence[Mapping[str, float]]) -> Table:
    """Return the runs of the random search beside the notebook's, which drew other numbers, and their spread."""
    table = Table(title="Random search for a linear classifier on MNIST", title_justify="left", title_style="bold")
    table.add_column("who", no_wrap=True)
    for heading in ("summed loss", "test accuracy", "iterations", "time"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_row("notebook", *_search_cells(NOTEBOOK_SEARCH), style="dim")
    for run in runs:
        table.add_row(f"knnbench, seed {run['seed']:.0f}", *_search_cells(run))
    table.add_section()
    ends = [{name: end(run[name] for run in runs) for name in NOTEBOOK_SEARCH} for end in (min, max)]
    spread = [" to ".join(cells) for cells in zip(*map(_search_cells, ends), strict=True)][: len(NOTEBOOK_SEARCH)]
    table.add_row("spread", *spread, "")
    inside = ["inside" if name not in outside_spread(runs) else "outside" for name in NOTEBOOK_SEARCH]
    table.add_row("the notebook is", *inside, "", style="red" if "outside" in inside else "")
    return table


def outside_spread(runs: Sequence[Mapping[str, float]]) -> list[str]:
    """Return which of the notebook's figures lie outside those of some runs.

    Examples
    --------
    >>> run = {"loss": 330.0, "accuracy": 0.5, "iterations": 400}
    >>> runs = [run, {"loss": 480.0, "accuracy": 0.6, "iterations": 500}]
    >>> outside_spread(runs)
    ['iterations']
    """
    ends = {name: (min(run[name] for run in runs), max(run[name] for run in runs)) for name in NOTEBOOK_SEARCH}
    return [name for name, theirs in NOTEBOOK_SEARCH.items() if not ends[name][0] <= theirs <= ends[name][1]]


def _search_cells(run: Mapping[str, float]) -> list[str]:
    return [
        f"{run['loss']:.2f}",
        f"{run['accuracy']:.2%}",
        f"{run['iterations']:.0f}",
        format_seconds(run["seconds"]) if "seconds" in run else "",
    ]
