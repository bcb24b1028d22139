"""How good the choice of a backend is."""

from . import common

# Shapes that no calibration measured, small enough for a commit.
N_PROBLEMS = 12
WORK = 1e8


class Choosing:
    """Time of the backend that was chosen over that of the best: the geometric mean."""

    version = "1"
    timeout = 600
    param_names = ("effort",)
    params = (["estimate"],)
    unit = "x the best"

    def setup(self, effort: str) -> None:
        """Find what chooses, which earlier commits lack."""
        try:
            from knnbench.selection import regret
        except ImportError:
            raise NotImplementedError("this commit has no regret") from None
        self.regret = regret

    def track_regret(self, effort: str) -> float:
        """Return the geometric mean."""
        asked = self.regret.problems(N_PROBLEMS, 0, WORK)
        rows = {row.name: row for row in self.regret.summaries(list(self.regret.outcomes(asked, 0.0)))}
        mean = rows[effort].geometric_mean
        if not mean > 1 / 2:  # the best, on the other half of the samples, cannot be far slower than a choice
            raise common.WrongAnswerError(f"a regret of {mean:.3g}")
        return float(mean)
