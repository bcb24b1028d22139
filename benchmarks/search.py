"""Speed of `knn` and `pairwise`."""

import statistics
import time
from typing import Any

from . import common


class Knn:
    """Seconds of a call of `knn` on a prepared corpus, host to host."""

    version = "1"
    timeout = 120
    rounds, repeat, number = common.ROUNDS, common.REPEAT, 1
    param_names = ("backend", "metric", "dtype", "workload")
    params = (common.BACKENDS, common.METRICS, common.DTYPES, ["images"])

    def setup(self, backend: str, metric: str, dtype: str, workload: str) -> None:
        """Compile, warm up and check, once."""
        self.search = common.checked_knn(backend, metric, dtype, common.WORKLOADS[workload])

    def time_knn(self, backend: str, metric: str, dtype: str, workload: str) -> Any:
        """Return the neighbours."""
        return self.search.knn()


class LoopingKnn(Knn):
    """The same for backends that loop in Python."""

    params = (common.LOOPING_BACKENDS, common.METRICS, ["float32"], ["tiny"])


class Pairwise:
    """Seconds of a call of `pairwise` on a prepared corpus, host to host."""

    version = "1"
    timeout = 120
    rounds, repeat, number = common.ROUNDS, common.REPEAT, 1
    param_names = ("backend", "metric", "dtype", "workload")
    params = (common.BACKENDS, common.METRICS, ["float32"], ["square"])

    def setup(self, backend: str, metric: str, dtype: str, workload: str) -> None:
        """Compile, warm up and check, once."""
        self.search = common.checked_pairwise(backend, metric, dtype, common.WORKLOADS[workload])

    def time_pairwise(self, backend: str, metric: str, dtype: str, workload: str) -> Any:
        """Return the distances."""
        return self.search.pairwise()


class LoopingPairwise(Pairwise):
    """The same for backends that loop in Python."""

    params = (common.LOOPING_BACKENDS, ["euclidean"], ["float32"], ["tiny"])


class Shapes:
    """Seconds of `knn` for 10^9 features of pairs, comparable between shapes; less is better, as asv takes it."""

    version = "1"
    timeout = 120
    param_names = ("backend", "workload")
    params = (common.BACKENDS, ["narrow", "single"])
    unit = "s / 10^9 feature pairs"

    calls = 15

    def setup(self, backend: str, workload: str) -> None:
        """Compile, warm up and check."""
        self.search = common.checked_knn(backend, "euclidean", "float32", common.WORKLOADS[workload])

    def track_knn_seconds_per_1e9(self, backend: str, workload: str) -> float:
        """Return the median of some calls."""
        seconds = []
        for _ in range(self.calls):
            start = time.perf_counter()
            self.search.knn()
            seconds.append(time.perf_counter() - start)
        n_queries, n_corpus, n_features, _ = common.WORKLOADS[workload]
        return 1e9 * statistics.median(seconds) / (n_queries * n_corpus * n_features)
