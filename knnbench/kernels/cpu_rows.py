"""What is done to single rows on the CPU before they are compared."""

import math
from typing import Any

from knnbench.kernels.compilation import compile_cached

__all__ = ["unit_rows"]


@compile_cached(nogil=True, fastmath={"reassoc", "contract"})
def _length(rows: Any, i: Any) -> Any:
    """Return the length of a row; only here may the compiler reorder, because a product of scales would overflow."""
    total = 0.0
    for f in range(rows.shape[1]):
        total += float(rows[i, f]) * float(rows[i, f])
    return math.sqrt(total)


@compile_cached(nogil=True, error_model="numpy")
def unit_rows(rows: Any, out: Any) -> None:
    """Fill `out` with float rows brought to unit length, as `Metric.prepare_rows` does.

    Each is first scaled to a largest element of about 1, by a power of two, which is exact.
    """
    n_rows, n_features = rows.shape
    for i in range(n_rows):
        largest = 0.0
        for f in range(n_features):
            largest = max(largest, abs(float(rows[i, f])))
        exponent = math.frexp(largest)[1]
        # In two steps: the power of two that lifts the smallest subnormals is itself out of range.
        first = exponent // 2
        scale, again = math.ldexp(1.0, -first), math.ldexp(1.0, first - exponent)
        for f in range(n_features):
            out[i, f] = float(rows[i, f]) * scale * again
        length = _length(out, i)
        for f in range(n_features):
            out[i, f] = float(out[i, f]) / length
