"""How good the choices of a backend are, over shapes: what ``knnbench regret --json`` printed, as rows for a chart."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from knnbench.errors import InvalidInputError
from knnbench.report.appearance import look_of
from knnbench.selection.problem import Problem
from knnbench.selection.regret import Outcome, summaries

__all__ = ["choice_rows", "read_outcomes"]


def read_outcomes(path: Path) -> list[Outcome]:
    """Return the outcomes in a file of ``knnbench regret --json``.

    Raises
    ------
    InvalidInputError
        If it cannot be read, or a line is no outcome.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise InvalidInputError(f"outcomes cannot be read from {path}: {reason}.") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            data = json.loads(line)
            problem = Problem(**data["problem"])
            alike = {way: tuple(names) for way, names in data["alike"].items()}
            outcome = Outcome(problem, dict(data["chosen"]), alike, dict(data["times"]))
            outcome.halves()
            found.append(outcome)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidInputError(
                f"{path} line {number} is not what `knnbench regret --json` prints: {type(error).__name__}: {error}."
            ) from None
    if not found:
        raise InvalidInputError(f"{path} holds no outcomes; `knnbench regret --json > {path}` measures some.")
    return found


def choice_rows(path: Path) -> dict[str, Any]:
    """Return rows for the chart of choices, and the summary of the regrets.

    Returns
    -------
    dict
        ``rows``, one for each problem and way of choosing, and ``summaries``.
    """
    outcomes = read_outcomes(path)
    dtypes = list(dict.fromkeys(outcome.problem.dtype for outcome in outcomes))
    rows = []
    for outcome in outcomes:
        problem = outcome.problem
        first, second = outcome.halves()
        fastest = min(first, key=lambda name: first[name] + second[name])
        shape = f"{problem.n_queries:,} x {problem.n_corpus:,} x {problem.n_features:,}"
        for way, chosen in outcome.chosen.items():
            rows.append(
                {
                    "way": way,
                    "panel": problem.dtype,
                    "panel_order": dtypes.index(problem.dtype),
                    "backend": fastest,
                    "chosen": chosen,
                    "regret": outcome.regret(chosen),
                    "pairs": problem.n_queries * problem.n_corpus,
                    "n_features": problem.n_features,
                    "metric": problem.metric,
                    "shape": shape + (f", k={problem.k}" if problem.k else ""),
                    "filled": look_of(fastest).filled,
                }
            )
    return {"rows": rows, "summaries": [asdict(summary) for summary in summaries(outcomes)]}
