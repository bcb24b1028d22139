"""Error of the distances."""

import math

from . import common

# How far the points are moved, and the largest error that is right: far from the origin |q|^2 + |c|^2 - 2 q.c
# cancels in float32, and how badly is for the graph to show.
DATASETS = {"near": (0.0, common.TOLERANCE), "far": (10_000.0, math.inf)}


class Accuracy:
    """max |d - d_ref| / max d_ref against float64 by the direct form."""

    version = "1"
    timeout = 120
    param_names = ("backend", "dataset")
    params = (common.BACKENDS, ["near", "far"])
    unit = "of the largest distance"

    def setup(self, backend: str, dataset: str) -> None:
        """Make the data, and prepare the corpus."""
        offset, self.limit = DATASETS[dataset]
        self.search = common.prepared_search(backend, "euclidean", "float32", common.WORKLOADS["square"], offset)

    def track_error(self, backend: str, dataset: str) -> float:
        """Return the error."""
        error = common.relative_error(self.search.pairwise(), self.search.data, "euclidean")
        if not error <= self.limit:
            raise common.WrongAnswerError(f"distances are off by {error:.2g} of the largest")
        return error
