"""What is done to single rows on the CPU before they are compared."""

import math
from typing import Any

import numpy as np

from knnbench.kernels.compilation import compile_cached

__all__ = ["unit_rows"]


@compile_cached(nogil=True, fastmath={"reassoc", "contract"})
def _length(rows: Any, i: Any) -> Any:
    """Return the length of a row; only here may the compiler reorder, because a product of scales would overflow."""
    total = 0.0
    for f in range(rows.shape[1]):
        total += float(rows[i, f]) * float(rows[i, f])
    return math.sqrt(total)


def unit_rows(rows: Any, out: Any) -> None:
    """Fill `out` with float rows brought to unit length, as `Metric.prepare_rows` does.

    Each is first scaled to a largest element of about 1, by a power of two, which is exact.
    """
    word = np.dtype(f"i{rows.itemsize}")
    _unit_rows(rows, rows.view(word), word.type(np.iinfo(word).max), out)


@compile_cached(nogil=True, error_model="numpy")
def _unit_rows(rows: Any, words: Any, all_but_sign: Any, out: Any) -> None:
    n_rows, n_features = rows.shape
    for i in range(n_rows):
        # Without their signs, floats are in the order of their bits, of which a compiler finds the largest in vectors.
        largest = all_but_sign & 0
        for f in range(n_features):
            largest = max(largest, words[i, f] & all_but_sign)
        is_double = words.itemsize == 8
        value = np.int64(largest).view(np.float64) if is_double else float(np.int32(largest).view(np.float32))
        exponent = math.frexp(value)[1]
        # In two steps: the power of two that lifts the smallest subnormals is itself out of range.
        first = exponent // 2
        scale, again = math.ldexp(1.0, -first), math.ldexp(1.0, first - exponent)
        for f in range(n_features):
            out[i, f] = float(rows[i, f]) * scale * again
        length = _length(out, i)
        for f in range(n_features):
            out[i, f] = float(out[i, f]) / length
