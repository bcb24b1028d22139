"""The blockwise search that NumPy, CuPy and PyTorch share.

A block of queries meets a block of the corpus, and of each block only the values that may still be among the
k smallest are kept. Metrics with a Gram form take the matrix product. On uint8 it is exact. On floats it
cancels, so there

- rows are centred by the corpus mean, once (a translation changes no difference);
- a few more than k candidates are kept and recomputed by the direct form, which also gives the distances
  returned;
- a query whose answer the declared error (`Space.gram_error`) could still change, and for which it exceeds
  `TOLERANCE` of the k-th value, is searched again by the direct form.

`BlockSearch` has all of this, once. `BlockwiseBackend` computes its blocks on any array module like numpy.
"""

from abc import abstractmethod
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from knnbench.blocking import MAX_CORPUS, MAX_QUERIES, block_shape, slices
from knnbench.bounds import Floats, direct_floor, gram_floor
from knnbench.metrics import Space
from knnbench.ordering import Selection, order_rows

from .base import Backend, Candidates, Native, float_operations

__all__ = ["BlockCorpus", "BlockSearch", "Blocks", "BlockwiseBackend"]

# Share of a value beyond which the declared error of its Gram form is too much.
TOLERANCE = 1e-3

# Candidates kept beyond k. On ordinary data the value of the last lies further from the k-th than the
# declared error, which proves that none was missed.
SPARE = 16

# Centred uint8 lie in -128..127: products are at most 2**14, and any partial sum of 1024 of them at most
# 2**24, so that float32 holds all of them exactly, in whatever order a BLAS adds.
CENTRE_OF_UINT8 = 128
EXACT_FEATURES = 1024

# Columns of a row that stand for it when its median is taken.
MEDIAN_SAMPLE = 256

# Elements of the temporary array when single pairs are recomputed.
PAIR_ELEMENTS = 1 << 20


@dataclass(frozen=True, slots=True)
class Blocks:
    """How large the pieces are that a search computes at once.

    Attributes
    ----------
    queries, corpus : int
        Rows of a block.
    elements : int
        Differences held when single pairs are recomputed.
    """

    queries: int
    corpus: int
    elements: int


@dataclass(frozen=True, slots=True)
class BlockCorpus:
    """Rows as the blockwise search wants them; of a corpus, and of a block of queries.

    Attributes
    ----------
    rows : (n, n_features) native array
        As the metric accumulates them.
    norms : native array or None
        Squared norms (n,) for the Gram form, in `Space.accumulator`; for cosine on uint8 in float64.
    centre : (n_features,) native array or None
        With a float Gram form, the mean of the corpus.
    centred : (n, n_features) native array or None
        With a float Gram form, ``rows - centre``; of uint8, the rows as a backend's integer products take them.
    """

    rows: Native
    norms: Native | None = None
    centre: Native | None = None
    centred: Native | None = None


class BlockSearch(Backend):
    """An own backend that searches block by block; what a block is computed with is its own.

    One that computes and selects at once brings its own `_nearest`, with the blocks that this wants (`_search_blocks`).

    Attributes
    ----------
    largest : Blocks
        Beyond these nothing is gained.
    """

    largest: ClassVar[Blocks] = Blocks(MAX_QUERIES, MAX_CORPUS, PAIR_ELEMENTS)

    @property
    @abstractmethod
    def xp(self) -> Any:
        """The array module, or an object with those of numpy's functions that are called here and in `ordering`."""

    @abstractmethod
    def settings(self) -> AbstractContextManager[None]:
        """Return what holds the library's global switches while a call computes."""

    @abstractmethod
    def direct_block(self, queries: Native, corpus: Native, space: Space) -> Native:
        """Return the accumulated values of all pairs by the direct form, shape (n_queries, n_corpus)."""

    @abstractmethod
    def _prepared_rows(self, rows: Native, space: Space) -> Native:
        """Return rows as the metric accumulates them."""

    @abstractmethod
    def _mean(self, rows: Native) -> Native:
        """Return the mean of float rows, summed in float64, in their dtype."""

    @abstractmethod
    def _take(self, rows: Native, centre: Native | None, space: Space) -> BlockCorpus:
        """Return prepared rows with all that the Gram form wants of them."""

    @abstractmethod
    def _block(self, block: BlockCorpus, prepared: BlockCorpus, space: Space, columns: slice) -> Native:
        """Return the values to rank of a block of queries and some columns of the corpus, by the form they prefer."""

    @abstractmethod
    def _pairs(self, queries: Native, corpus: Native, i: Native, j: Native, space: Space, elements: int) -> Native:
        """Return the accumulated values of single pairs by the direct form, shape (n_pairs,)."""

    def prepare(self, corpus: Native, space: Space) -> BlockCorpus:
        """Centre a corpus and take its norms, where the metric has a Gram form."""
        with self.settings():
            rows = self._prepared_rows(corpus, space)
            has_centre = not space.is_integer and space.form.from_dot is not None
            return self._take(rows, self._mean(rows) if has_centre else None, space)

    def prepare_about(self, corpus: Native, centre: Any, space: Space) -> BlockCorpus:
        """Centre a corpus about a given point and take its norms."""
        with self.settings():
            return self._take(self._prepared_rows(corpus, space), self.to_native(centre, space.dtype), space)

    def pairwise(self, queries: Native, prepared: BlockCorpus, space: Space, budget: int) -> Native:
        """Return all distances."""
        xp, n_corpus = self.xp, len(prepared.rows)
        blocks = self._blocks(len(queries), n_corpus, 1, space, budget)
        # Without a float Gram form nothing is looked at again, and a block can be finished at once.
        is_gram = prepared.centre is not None
        result = xp.empty((len(queries), n_corpus), dtype=space.output)
        with self.settings():
            for rows in slices(len(queries), blocks.queries):
                block = self._take_queries(queries[rows], prepared, space)
                for columns in slices(n_corpus, blocks.corpus):
                    values = self._block(block, prepared, space, columns)
                    result[rows, columns] = values if is_gram else self.finish(values, space)
                if is_gram:
                    self._mend_rows(result[rows], block, prepared, blocks, space)
                    for columns in slices(n_corpus, blocks.corpus):
                        result[rows, columns] = self.finish(result[rows, columns], space)
        return result

    def knn(self, queries: Native, prepared: BlockCorpus, k: int, space: Space, budget: int) -> tuple[Native, Native]:
        """Return the k nearest."""
        xp, n_corpus = self.xp, len(prepared.rows)
        ranked = xp.empty((len(queries), k), dtype=space.ranked)
        indices = xp.empty((len(queries), k), dtype=np.int64)
        wanted = k if prepared.centre is None else min(k + SPARE, n_corpus)
        blocks = self._search_blocks(len(queries), n_corpus, wanted, space, budget)
        with self.settings():
            for rows in slices(len(queries), blocks.queries):
                block = self._take_queries(queries[rows], prepared, space)
                found = self._nearest(block, prepared, wanted, space, blocks)
                if prepared.centre is not None:
                    found = self._mend_neighbors(*found, k, block, prepared, blocks, space)
                ranked[rows], indices[rows] = found
        return ranked, indices

    def candidates(self, queries: Native, prepared: BlockCorpus, count: int, space: Space, budget: int) -> Candidates:
        """Return what is selected by the form that blocks are computed in, by itself: nothing is computed once more."""
        n_queries, n_corpus = len(queries), len(prepared.rows)
        indices = self.xp.empty((n_queries, count), dtype=np.int64)
        floor, last = np.empty(n_queries), np.empty(n_queries)
        blocks = self._search_blocks(n_queries, n_corpus, count, space, budget)
        with self.settings():
            for rows in slices(n_queries, blocks.queries):
                block = self._take_queries(queries[rows], prepared, space)
                values, indices[rows] = self._nearest(block, prepared, count, space, blocks)
                last[rows] = self.to_numpy(values[:, -1])
                floor[rows] = self._floor(last[rows], block, prepared, space)
        form = "differences" if prepared.centre is None else "products"
        return Candidates(indices, floor, last, f"{space.dtype} {form}")

    def _floor(self, last: Floats, block: BlockCorpus, prepared: BlockCorpus, space: Space) -> Floats:
        if prepared.centre is None:
            return direct_floor(space, last)
        assert block.norms is not None
        assert prepared.norms is not None
        return gram_floor(space, last, self.to_numpy(block.norms), float(prepared.norms.max()))

    def operations(self, space: Space, op: str) -> dict[str, float]:
        """Return those of the products, or of the direct form on floats."""
        if space.is_integer and space.form.from_dot is None:
            return {}  # in a unit that is each backend's own
        return float_operations(self.capabilities.device, space, product=True)

    def _take_queries(self, queries: Native, prepared: BlockCorpus, space: Space) -> BlockCorpus:
        return self._take(self._prepared_rows(queries, space), prepared.centre, space)

    def _nearest(
        self, block: BlockCorpus, prepared: BlockCorpus, k: int, space: Space, blocks: Blocks, *, direct: bool = False
    ) -> tuple[Native, Native]:
        """Return the values to rank and indices of the k nearest, by the form that blocks prefer or the direct one."""
        selection = Selection(self.xp, k)
        for columns in slices(len(prepared.rows), blocks.corpus):
            if direct:
                values = self.direct_block(block.rows, prepared.rows[columns], space)
            else:
                values = self._block(block, prepared, space, columns)
            selection.update(values, columns.start)
        return selection.values, selection.indices

    def _mend_neighbors(
        self, values: Native, indices: Native, k: int, block: BlockCorpus, prepared: BlockCorpus, blocks: Blocks,
        space: Space,
    ) -> tuple[Native, Native]:  # fmt: skip
        """Return the k nearest of Gram candidates by the direct form, or of all rows where those do not suffice."""
        ranked, nearest = self._recomputed(indices, block, prepared, space, blocks)
        ranked, nearest = ranked[:, :k], nearest[:, :k]
        if values.shape[1] == len(prepared.rows):
            return ranked, nearest
        good = self._are_right(values[:, -1], ranked[:, -1], block, prepared, space)
        again = self.xp.nonzero(~good)[0]
        if len(again):
            ranked[again], nearest[again] = self._search_again(again, k, block, prepared, blocks, space)
        return ranked, nearest

    def _recomputed(
        self, indices: Native, block: BlockCorpus, prepared: BlockCorpus, space: Space, blocks: Blocks
    ) -> tuple[Native, Native]:
        """Return the values by the direct form of candidates (n_queries, n), and the candidates, in order."""
        xp, (n_queries, wanted) = self.xp, indices.shape
        pairs = xp.repeat(xp.arange(n_queries), wanted), indices.reshape(-1)
        direct = self._pairs(block.rows, prepared.rows, *pairs, space, blocks.elements).reshape(n_queries, wanted)
        ordered: tuple[Native, Native] = order_rows(xp, direct, indices)
        return ordered

    def _are_right(self, last: Native, kth: Native, block: BlockCorpus, prepared: BlockCorpus, space: Space) -> Native:
        """Return for which queries the declared error can hardly change the answer.

        Parameters
        ----------
        last : (n_queries,) native array
            The largest value selected, by the Gram form.
        kth : (n_queries,) native array
            The k-th value by the direct form.
        block, prepared, space
        """
        xp = self.xp
        # A row at most sqrt(kth) from a query is at most that much longer, which bounds its norm.
        kth = xp.asarray(kth, dtype=np.float64)
        length = xp.sqrt(xp.asarray(block.norms, dtype=np.float64))
        error = space.gram_error * (length**2 + (length + xp.sqrt(kth)) ** 2)
        # Written so that a comparison with NaN, from an overflow, asks for the direct form.
        good = (error <= TOLERANCE * kth) | (last - error > kth)
        # Norms whose sum overflows make some Gram values NaN, which displace candidates of any query.
        largest_sum = xp.asarray(block.norms, dtype=np.float64) + float(prepared.norms.max())  # type: ignore[union-attr]
        return good & (largest_sum <= float(np.finfo(space.dtype).max) / 4)

    def _search_again(
        self, again: Native, k: int, block: BlockCorpus, prepared: BlockCorpus, blocks: Blocks, space: Space
    ) -> tuple[Native, Native]:
        """Return the k nearest of some queries of a block by the direct form, of all rows."""
        return self._nearest(BlockCorpus(block.rows[again]), prepared, k, space, blocks, direct=True)

    def _mend_rows(
        self, values: Native, block: BlockCorpus, prepared: BlockCorpus, blocks: Blocks, space: Space
    ) -> None:
        """Recompute by the direct form, in place, what the Gram form's declared error could have spoilt.

        That is a row, if the error of any of its values exceeds `TOLERANCE` of both the value and the row's
        median; and any value that is smaller than its own error, such as the distance of a row to itself.
        """
        xp, n_corpus = self.xp, len(prepared.rows)
        assert block.norms is not None
        assert prepared.norms is not None
        declared = space.gram_error
        sample = values[:, :: max(1, n_corpus // MEDIAN_SAMPLE)]
        limit = TOLERANCE * xp.median(sample, axis=1)
        most = declared * (block.norms + prepared.norms.max())
        spoilt = ~(most <= limit)
        doubtful = xp.nonzero(spoilt)[0]
        if len(doubtful):
            any_too_far = xp.zeros(len(doubtful), dtype=bool)
            for columns in slices(n_corpus, blocks.corpus):
                error = declared * (block.norms[doubtful, None] + prepared.norms[None, columns])
                allowed = xp.maximum(limit[doubtful, None], TOLERANCE * values[doubtful, columns])
                any_too_far |= (~(error <= allowed)).any(axis=1)
            spoilt[doubtful] = any_too_far
        again = xp.nonzero(spoilt)[0]
        for columns in slices(n_corpus, blocks.corpus):
            if len(again):
                values[again, columns] = self.direct_block(block.rows[again], prepared.rows[columns], space)
            part = values[:, columns]
            i, j = xp.nonzero((part < most[:, None]) & ~spoilt[:, None])
            if len(i):
                part[i, j] = self._pairs(block.rows, prepared.rows, i, j + columns.start, space, blocks.elements)

    def _search_blocks(self, n_queries: int, n_corpus: int, k: int, space: Space, budget: int) -> Blocks:
        """Return the blocks that the k nearest are searched in."""
        return self._blocks(n_queries, n_corpus, k, space, budget)

    def _blocks(self, n_queries: int, n_corpus: int, k: int, space: Space, budget: int) -> Blocks:
        """Return the largest useful blocks, from what the methods hold at the same time."""
        size = max(4, space.accumulator.itemsize)
        lists = 6 * k * (space.ranked.itemsize + 8)
        pair_bytes = min(budget // 4, 3 * self.largest.elements * size)
        queries, corpus = block_shape(
            n_queries,
            n_corpus,
            budget=budget - pair_bytes,
            per_pair=4 * max(size, space.ranked.itemsize) + 8,
            per_query=4 * space.n_features * size + lists,
            per_corpus=2 * space.n_features * size,
            max_queries=self.largest.queries,
            max_corpus=self.largest.corpus,
        )
        return Blocks(queries, corpus, pair_bytes // (3 * size))


class BlockwiseBackend(BlockSearch):
    """An own backend on an array module like numpy."""

    def settings(self) -> AbstractContextManager[None]:
        """Hold nothing."""
        return nullcontext()

    def _prepared_rows(self, rows: Native, space: Space) -> Native:
        return rows if space.is_integer else space.metric.prepare_rows(self.xp, rows)

    def _mean(self, rows: Native) -> Native:
        return rows.mean(axis=0, dtype=np.float64).astype(rows.dtype)

    def _take(self, rows: Native, centre: Native | None, space: Space) -> BlockCorpus:
        if space.form.from_dot is None:
            return BlockCorpus(rows)
        if centre is None:
            return BlockCorpus(rows, self._integer_norms(rows, space))
        centred = rows - centre
        return BlockCorpus(rows, self.xp.einsum("nf,nf->n", centred, centred), centre, centred)

    def _integer_norms(self, rows: Native, space: Space) -> Native:
        """Return the squared norms that belong to `_exact_dot`'s values: centred, unless the dot itself is wanted."""
        xp, uncentred = self.xp, space.form.rank_uses_norms
        norms = xp.empty(len(rows), dtype=np.float64 if uncentred else space.accumulator)
        for part in slices(len(rows), max(1, PAIR_ELEMENTS // space.n_features)):
            values = rows[part].astype(np.int32)
            if not uncentred:
                values -= CENTRE_OF_UINT8
            norms[part] = (values * values).sum(axis=1, dtype=np.int64)
        return norms

    def _exact_dot(self, queries: Native, corpus: Native, space: Space) -> Native:
        """Return the dot products of centred uint8 rows, exact, in `Space.accumulator`."""
        xp, dots = self.xp, None
        for features in slices(space.n_features, EXACT_FEATURES):
            a = queries[:, features].astype(np.float32) - CENTRE_OF_UINT8
            b = corpus[:, features].astype(np.float32) - CENTRE_OF_UINT8
            product = xp.matmul(a, b.T).astype(space.accumulator)
            dots = product if dots is None else xp.add(dots, product, out=dots)
        return dots

    def _block(self, block: BlockCorpus, prepared: BlockCorpus, space: Space, columns: slice) -> Native:
        xp, form, corpus = self.xp, space.form, prepared.rows[columns]
        if form.from_dot is None:
            return self.direct_block(block.rows, corpus, space)
        assert block.norms is not None
        assert prepared.norms is not None
        norms = block.norms[:, None], prepared.norms[None, columns]
        if prepared.centred is not None:
            values = form.from_dot(xp.matmul(block.centred, prepared.centred[columns].T), *norms)
            return xp.maximum(values, 0, out=values)
        dots = self._exact_dot(block.rows, corpus, space)
        if form.rank_uses_norms:
            dots += self._centring(block.rows, space)[:, None] + self._centring(corpus, space)[None, :]
            dots -= CENTRE_OF_UINT8**2 * space.n_features
        return form.rank_arrays(xp, form.from_dot(dots, *norms), *norms)

    def _centring(self, rows: Native, space: Space) -> Native:
        """Return what centring one side took from its dot products: 128 times the sums of its rows."""
        return CENTRE_OF_UINT8 * rows.sum(axis=1, dtype=space.accumulator)
