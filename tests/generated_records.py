"""Records made up for tests of what is shown: many, of all statuses, or with names that mean harm."""

import itertools
from dataclasses import replace

import numpy as np

from knnbench.results import Record

BACKENDS = ("python", "numpy", "numba", "torch", "cupy", "scipy", "sklearn", "faiss", "torch-cdist", "notebook")
PEERS = ("scipy", "sklearn", "faiss", "torch-cdist", "notebook")
MACHINE = {
    "cpu": "AMD EPYC 9B14", "features": ["avx2", "avx512f"], "cpus": 2, "memory_bytes": 24 << 30, "gpus": [],
    "cache_bytes": 32 << 20, "os": "Linux", "arch": "x86_64", "python": "3.11.9",
}  # fmt: skip

# What a page must show as it is, and neither run nor take for markup, for the end of the data, or for a formula.
HOSTILE = (
    '=1+1</script><script>document.body.dataset.owned="yes"</script><img src=x onerror="document.body.dataset.owned=1">'
    "&amp;\"'`${1}$title{{1}}<!--\u2028\u202e"
)


def made(backend="numpy", times=None, *, seconds=0.01, n=9, seed=0, **changes):
    """Return an ok record of digits; times are drawn around `seconds` if not given."""
    rng = np.random.default_rng([seed, *backend.encode()])
    if times is None:
        times = (seconds * np.exp(0.02 * rng.standard_normal(n))).tolist()
    fields = {
        "op": "knn", "backend": backend, "metric": "cityblock", "dataset": "digits", "dtype": "float32", "k": 3,
        "n_queries": 100, "n_corpus": 1000, "n_features": 64, "status": "ok", "measured_queries": 100,
        "measured_corpus": 1000, "peer": backend in PEERS, "error": 3e-8, "recall": 1.0, "n_checked": 16,
        "floor_s": seconds / 4, "bound": "add-float32", "operations": {"add-float32": 6.4e6},
        "ceilings": {"add-float32": 6.4e6 / (seconds / 4), "read": 2e10}, "peak_bytes": 5_000_000, "threads": 2,
        "version": "0.1.0", "library": "1.0", "libraries": {"numpy": "2.4.6"}, "commit": "0123456789ab",
        "run": "20261126T100000-aaaaaa", "started": "2026-11-26T10:00:00+00:00", "machine": MACHINE,
        "phases": {"import": [0.5], "prepare": [0.01], "first_call": [0.2], "call": [float(time) for time in times]},
    }  # fmt: skip
    return Record(**{**fields, **changes})


def many(n_records, n=25):
    """Return records of as many cases as it takes, all backends on each."""
    sizes = itertools.product((16, 64, 256, 784), (1000, 10_000, 60_000), (1, 10, 100, 1000))
    kinds = itertools.product(("knn", "pairwise"), ("cityblock", "euclidean", "chebyshev"), ("uint8", "float32"))
    records = []
    for (op, metric, dtype), (n_features, n_corpus, n_queries) in itertools.product(kinds, list(sizes)):
        for place, backend in enumerate(BACKENDS):
            records.append(
                made(
                    backend,
                    seconds=1e-9 * n_queries * n_corpus * n_features * (1 + place) ** 2 / 10,
                    seed=len(records),
                    n=n,
                    op=op,
                    metric=metric,
                    dtype=dtype,
                    k=3 if op == "knn" else None,
                    n_queries=n_queries,
                    n_corpus=n_corpus,
                    n_features=n_features,
                    measured_queries=n_queries,
                    measured_corpus=n_corpus,
                    error=10.0 ** -(16 - place),
                )
            )
        records.append(replace(records[-9], twin=True))
        if len(records) >= n_records:
            break
    return records[:n_records]
