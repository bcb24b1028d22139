"""Exact answers by whole numbers, and the data that break what rounds.

Floats are whole numbers of a power of two. Nothing of `knnbench.exact` is used here.
"""

from fractions import Fraction
from functools import cmp_to_key

import numpy as np

from knnbench.metrics import METRICS

FLOATS = ("float32", "float64")


def whole(rows):
    """Return rows as lists of Python integers, all in one unit, and the unit."""
    ratios = [[x.as_integer_ratio() for x in row] for row in np.asarray(rows, np.float64).tolist()]
    unit = max(denominator for row in ratios for _, denominator in row)
    return [[numerator * (unit // denominator) for numerator, denominator in row] for row in ratios], Fraction(1, unit)


SUMS = {
    "euclidean": lambda q, c: sum((a - b) ** 2 for a, b in zip(q, c, strict=True)),
    "sqeuclidean": lambda q, c: sum((a - b) ** 2 for a, b in zip(q, c, strict=True)),
    "cityblock": lambda q, c: sum(abs(a - b) for a, b in zip(q, c, strict=True)),
    "chebyshev": lambda q, c: max(abs(a - b) for a, b in zip(q, c, strict=True)),
}


def dot(q, c):
    return sum(a * b for a, b in zip(q, c, strict=True))


def exact_values(queries, corpus, metric):
    """Return the exact accumulated values of all pairs, of all metrics but cosine, as fractions."""
    numbers, unit = whole(np.concatenate([queries, corpus]))
    power = 2 if "euclidean" in metric else 1
    q, c = numbers[: len(queries)], numbers[len(queries) :]
    return [[SUMS[metric](a, b) * unit**power for b in c] for a in q]


def exact_neighbors(queries, corpus, k, metric):
    """Return the indices of the k nearest of exact arithmetic, shape (n_queries, k)."""
    numbers, _ = whole(np.concatenate([queries, corpus]))
    q, c = numbers[: len(queries)], numbers[len(queries) :]
    result = []
    for a in q:
        if METRICS[metric].unit_rows:
            # Of one query, the cosine grows with d |d| / |c|^2.
            found = [(d * abs(d), dot(b, b), j) for j, b in enumerate(c) for d in [dot(a, b)]]
            found.sort(key=cmp_to_key(lambda x, y: (y[0] * x[1] - x[0] * y[1]) or x[2] - y[2]))
        else:
            found = sorted((SUMS[metric](a, b), j) for j, b in enumerate(c))
        result.append([one[-1] for one in found[:k]])
    return np.array(result)


def exact_distance(q, c, metric):
    """Return the distance of one pair as a fraction, to 200 bits more than float64 has."""
    (a, b), unit = whole(np.stack([q, c]))
    if not METRICS[metric].unit_rows:
        value = SUMS[metric](a, b) * unit ** (2 if "euclidean" in metric else 1)
        return root(value) if metric == "euclidean" else value
    product, norms = dot(a, b), dot(a, a) * dot(b, b)
    length = root(Fraction(norms))
    # Nothing cancels in this form but what is exact.
    return (norms - product**2) / (length * (length + product)) if product > 0 else 1 - product / length


def root(value):
    """Return the root of a fraction, to a relative error of 2**-250."""
    from math import isqrt

    if value == 0:
        return Fraction(0)
    size = value.numerator.bit_length() - value.denominator.bit_length()
    shift = 600 - size + size % 2
    return Fraction(isqrt(int(value * Fraction(2) ** shift)), 1) / Fraction(2) ** (shift // 2)


def rounded(exact, dtype):
    """Return a fraction rounded to float64, and then to the dtype."""
    try:
        nearest = np.float64(exact.numerator / exact.denominator)
    except OverflowError:
        nearest = np.float64(np.inf)
    with np.errstate(over="ignore", under="ignore"):
        return nearest.astype(dtype)


def data(kind, dtype, n_queries, n_corpus, n_features, rng):
    """Return queries and a corpus of a kind."""
    info, n = np.finfo(dtype), n_queries + n_corpus
    rows = rng.normal(size=(n, n_features))
    rows = KINDS[kind](rows, info, rng)
    rows = np.ascontiguousarray(rows, dtype)
    rows[~rows.any(axis=1), 0] = 1  # which cosine needs
    return rows[:n_queries], rows[n_queries:]


def near(rows, info, rng):
    """Return rows that differ from one row by a unit in the last place."""
    one = rows[:1].astype(info.dtype)
    return one + rng.integers(-1, 2, rows.shape) * np.spacing(one)


def mirrored(rows, info, rng):
    """Return rows at equal distances on all sides of a point, which no grid of few bits holds."""
    point = np.round(rows[:1] * 2**10) / 2**10
    signs = rng.choice([-1, 1], rows.shape)
    signs[: len(rows) // 4] = 0
    return point + signs * np.round(np.abs(rows[-1:]) * 2**10) / 2**10


def equal(rows, info, rng):
    return rows[rng.integers(0, max(1, len(rows) // 12), len(rows))]


KINDS = {
    "normal": lambda rows, info, rng: rows,
    "far": lambda rows, info, rng: rows + 1000,
    "far apart": lambda rows, info, rng: rows + rng.choice([-4, 4], (len(rows), 1)) / np.sqrt(float(info.eps)),
    "equal": equal,
    "few values": lambda rows, info, rng: rng.integers(0, 3, rows.shape).astype(np.float64),
    "near": near,
    "mirrored": mirrored,
    "multiples": lambda rows, info, rng: (
        np.rint(equal(rows, info, rng) * 9) * 2.0 ** rng.integers(-5, 6, (len(rows), 1))
    ),
    "tiny": lambda rows, info, rng: rows * float(info.tiny) / 3,
    "subnormal": lambda rows, info, rng: np.rint(rows * 5) * float(info.smallest_subnormal),
    "small": lambda rows, info, rng: rows * float(info.tiny) ** 0.55,
    "big": lambda rows, info, rng: rows * float(info.max) ** 0.55,
    "huge": lambda rows, info, rng: rows / np.abs(rows).max() * (float(info.max) * 0.99),
    "mixed": lambda rows, info, rng: rows * 10.0 ** rng.uniform(-12, 12, rows.shape[1]),
    "all exponents": lambda rows, info, rng: (
        np.clip(rows, -9, 9)
        * 10.0 ** (0.95 * rng.uniform(np.log10(float(info.tiny)), np.log10(float(info.max)), rows.shape))
    ),
}
