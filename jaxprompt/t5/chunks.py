"""Attention in chunks of queries, with memory linear in a row's length.

`Chunked` is one of the paths that `t5.paths.choose` picks from.
"""

import jax
import jax.numpy as jnp

from jaxprompt.t5.attention import attend
from jaxprompt.t5.layers import fold_key
from jaxprompt.t5.sight import Sight
from jaxprompt.typing import Array

CHUNK = 128  # queries at a time


class Chunked:
    """Scores, mask and bias of some queries at a time, computed again in the backward pass.

    Memory is linear in the row's length. The bias depends on key minus query position only, so a
    strip of one chunk's queries by all distances is made once, and each chunk's bias is a slice of
    it: a gather in every chunk cost a seventh of a packed step on TPU. Every derivative is there,
    that of the bias table too, and costs nothing where the table is frozen. Source: Rabe & Staats
    2021, chunked over queries only.
    """

    def __init__(self, sight: Sight, size: int = CHUNK):
        self.sight = sight
        queries = sight.query_segments_BT.shape[1]
        self.count = -(-queries // size)
        self.size = -(-queries // self.count)  # chunks of one size, with the least padding

    def prepare(self, table_HR: Array | None) -> tuple[Array, Array | None] | None:
        """A strip and the bias of prefixes.

        The strip is [H, size, distances], column x at distance x - `_shift` from the first query.
        """
        if table_HR is None:
            return None
        own_keys = self.sight.key_segments_BS.shape[1] - self.sight.prefix
        distances_X = jnp.arange(own_keys + self._shift) - self._shift
        strip = self.sight.own_bias(table_HR, jnp.arange(self.size), distances_X)
        return strip, self.sight.prefix_bias(table_HR)

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: tuple[Array, Array | None] | None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """As `Path`; a chunk draws its dropout from the key folded with its first position."""

        def chunk(arguments: tuple) -> Array:
            first, query_BCHK, segments_BC, places_BC = arguments
            bias = None
            if prepared is not None:
                strip, prefix_HTP = prepared
                own_keys = key_BSHK.shape[1] - self.sight.prefix
                own = jax.lax.dynamic_slice_in_dim(strip, self._shift - first, own_keys, axis=2)
                bias = self.sight.behind_bias(own, prefix_HTP, places_BC)
            mask_BCS = self.sight.mask(first, segments_BC)
            key = fold_key(dropout_key, first)
            return attend(query_BCHK, key_BSHK, value_BSHK, bias, mask_BCS, dropout_rate, key)

        first_C = jnp.arange(self.count) * self.size
        queries = (query_BTHK, self.sight.query_segments_BT, self.sight.places())
        chunks = (first_C, *jax.tree.map(self._split, queries))
        context_CBTHK = jax.lax.map(jax.checkpoint(chunk, prevent_cse=False), chunks)
        context_BTHK = jnp.moveaxis(context_CBTHK, 0, 1).reshape(
            query_BTHK.shape[0], self.count * self.size, *query_BTHK.shape[2:]
        )
        return context_BTHK[:, : query_BTHK.shape[1]]

    @property
    def _shift(self) -> int:
        """Position of the last chunk's first query."""
        return (self.count - 1) * self.size

    def _split(self, x_BT: Array) -> Array:
        """[B, T, ...] -> [chunks, B, size, ...], zeros behind T."""
        missing = self.count * self.size - x_BT.shape[1]
        padded = jnp.pad(x_BT, ((0, 0), (0, missing), *((0, 0),) * (x_BT.ndim - 2)))
        shape = (x_BT.shape[0], self.count, self.size, *x_BT.shape[2:])
        return jnp.moveaxis(padded.reshape(shape), 1, 0)
