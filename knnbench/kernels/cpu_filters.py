"""Which filters tell, on this CPU, what rows of floats to look at."""

import math
import operator
from dataclasses import dataclass
from typing import ClassVar

from knnbench.kernels import cpu_bytes, cpu_digits
from knnbench.kernels.cpu_bytes import ByteKernels, byte_kernels, narrow_space
from knnbench.kernels.cpu_tiles import OPERATION_OF, Filter, TileKernels, kept_rows, level_in_use, tile_kernels
from knnbench.metrics import Space

__all__ = ["ByteFilter", "KeyFilter", "filters_of"]


# A filter that keeps rows keeps at most one of so many: what keeping takes, it saves on few others.
KEPT_SHARE = 16

# Bytes pay where a list of the nearest of rows in any order takes at most one of so many: several times as many rows
# are looked at, and each takes as long as comparing the bytes of twenty (measured).
LISTED_SHARE = 64


@dataclass(frozen=True, slots=True)
class ByteFilter:
    """Bytes that stand for rows (`knnbench.kernels.cpu_bytes`), where an instruction compares many at once.

    Attributes
    ----------
    least_bytes : int
        From rows of so many on it pays (measured).
    least_work : int
        Features of all pairs, below which finding a grid and packing take longer than it saves.
    """

    least_bytes: int
    least_work: ClassVar[int] = 1 << 26

    def serves(self, space: Space) -> bool:
        """Return whether it works on this CPU, and pays."""
        is_long = space.n_features * space.dtype.itemsize >= self.least_bytes
        is_proved = space.n_features <= cpu_bytes.MOST_FEATURES
        return is_long and is_proved and bool(tile_kernels(narrow_space(space)).plan.panels.instruction)

    def pays(self, k: int, n_corpus: int) -> bool:
        """Return whether so few rows of so many are nearest that it saves more than it takes."""
        return LISTED_SHARE * k * (1 + math.log(n_corpus / k)) <= n_corpus

    def kernels(self, space: Space) -> ByteKernels:
        """Return its kernels, compiled when they are first called."""
        return byte_kernels(space)


@dataclass(frozen=True, slots=True)
class KeyFilter(Filter):
    """Keys whose error is declared.

    Attributes
    ----------
    least_features : int
        From so many on it pays; below, the direct form is as fast (measured).
    needs_matrix : bool
        Whether it takes a matrix unit, which multiplies bytes.
    least_work : int
        Features of all pairs, below which centring and proving take longer than it saves.
    """

    least_features: int
    needs_matrix: bool = False
    least_work: ClassVar[int] = 1 << 22

    def serves(self, space: Space) -> bool:
        """Return whether it works on this CPU, and pays."""
        if self.needs_matrix and not (level_in_use().has_matrix and space.n_features <= cpu_digits.MOST_FEATURES):
            return False
        return space.n_features >= self.least_features

    def pays(self, k: int, n_corpus: int) -> bool:
        """Return whether so few rows of so many are nearest that it saves more than it takes."""
        return KEPT_SHARE * kept_rows(k, n_corpus) <= n_corpus

    def kernels(self, space: Space) -> TileKernels:
        """Return its kernels, compiled when they are first called."""
        return tile_kernels(space, self)


GRAM_ERROR, LARGER_ERROR = operator.attrgetter("gram_error"), operator.attrgetter("larger_error")

# By the first word of the operation's name that they filter, the fastest first.
FILTERS: dict[str, tuple[ByteFilter | KeyFilter, ...]] = {
    "square": (
        ByteFilter(256),
        KeyFilter("digits", "digits", cpu_digits.error, cpu_digits.exact_error, 32, needs_matrix=True),
        KeyFilter("product", "gram", GRAM_ERROR, GRAM_ERROR, 64),
    ),
    "absolute": (ByteFilter(128), KeyFilter("larger", "larger", LARGER_ERROR, LARGER_ERROR, 64)),
}


def filters_of(space: Space) -> tuple[ByteFilter | KeyFilter, ...]:
    """Return what filters the distances of a space on this CPU, if that pays, the fastest first."""
    if space.is_integer:
        return ()
    return tuple(one for one in FILTERS.get(OPERATION_OF[space.form.accumulate], ()) if one.serves(space))
