"""Ways to compute the attention of whole rows, and the one place that picks one: `choose`.

`Plain` holds all scores of a row at once, `Chunked` those of some queries. Called by `t5.model`.
"""

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp

from jaxprompt.t5.attention import attend, relative_bias, segment_mask
from jaxprompt.t5.layers import fold_key
from jaxprompt.typing import Array

NOBODY = -1  # the segment of a key that none may see
CHUNK = 128  # queries at a time
LONG = {"cpu": 2048, "gpu": 1024, "tpu": 512}  # keys from which "auto" takes chunks, by platform


@dataclasses.dataclass(frozen=True)
class Sight:
    """Who sees whom in a batch of rows: what masks and biases are made from, for any queries.

    Attributes:
      query_segments_BT: int32, 0 = padding.
      key_segments_BS: int32, keys of trained prefixes first; `NOBODY` = seen by none.
      prefix: how many keys are of prefixes; they stand nowhere, so have no bias and no future.
      causal: whether the row's own keys after a query are hidden from it.
      max_distance: of the relative bias.
    """

    query_segments_BT: Array
    key_segments_BS: Array
    prefix: int = 0
    causal: bool = False
    max_distance: int = 128

    def behind_prefix(
        self, slots: int, prompt_index_BG: Array, mask_QP: Array | None = None
    ) -> "Sight":
        """The same with G*P keys in front, which `attention.with_prefix` puts there.

        Args:
          slots: P.
          prompt_index_BG: which of the Q prompts a segment uses.
          mask_QP: bool, False where a prompt has no such slot.
        """
        rows, segments = prompt_index_BG.shape
        owner_BX = jnp.broadcast_to(
            jnp.repeat(jnp.arange(1, segments + 1), slots)[None], (rows, segments * slots)
        )
        if mask_QP is not None:
            owner_BX = jnp.where(mask_QP[prompt_index_BG].reshape(rows, -1), owner_BX, NOBODY)
        return dataclasses.replace(
            self,
            key_segments_BS=jnp.concatenate([owner_BX, self.key_segments_BS], axis=1),
            prefix=self.prefix + segments * slots,
        )

    def mask(self, first: Array | int, query_segments_BT: Array) -> Array:
        """bool [B, T, S] of the T queries from position `first` on."""
        mask_BTS = segment_mask(query_segments_BT, self.key_segments_BS)
        if self.causal:
            positions_T, positions_S = self._positions(first, query_segments_BT.shape[1])
            ahead_TS = (positions_S[None, :] > positions_T[:, None]) & (positions_S >= 0)[None, :]
            mask_BTS = mask_BTS & ~ahead_TS[None]
        return mask_BTS

    def bias(self, table_HR: Array) -> Array:
        """float32 [H, T, S] of all queries, 0 at the keys of prefixes."""
        positions_T, positions_S = self._positions(0, self.query_segments_BT.shape[1])
        return self.before_prefix(self.own_bias(table_HR, positions_T, positions_S[self.prefix :]))

    def own_bias(self, table_HR: Array, positions_T: Array, positions_S: Array) -> Array:
        """float32 [H, T, S] of a row's own keys and queries at these positions."""
        return relative_bias(
            table_HR,
            positions_T,
            positions_S,
            bidirectional=not self.causal,
            max_distance=self.max_distance,
        )

    def before_prefix(self, bias_HTS: Array) -> Array:
        """A bias of the row's own keys, with zeros for those of prefixes in front."""
        return jnp.pad(bias_HTS, ((0, 0), (0, 0), (self.prefix, 0)))

    def _positions(self, first: Array | int, queries: int) -> tuple[Array, Array]:
        keys = self.key_segments_BS.shape[1]
        return first + jnp.arange(queries), jnp.arange(keys) - self.prefix


class Path(Protocol):
    """A way to compute attention over the rows of one `Sight`."""

    def prepare(self, table_HR: Array | None) -> Array | None:
        """What `__call__` wants to know of the relative bias; None = there is none."""
        ...

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: Array | None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """Attention as `attention.attend` defines it, [B, T, H, K]."""
        ...


class Plain:
    """All scores at once; mask and (shared) bias are made once a stack."""

    def __init__(self, sight: Sight):
        self.sight = sight
        self.mask_BTS = sight.mask(0, sight.query_segments_BT)

    def prepare(self, table_HR: Array | None) -> Array | None:
        """The whole bias, [H, T, S]."""
        if table_HR is None:
            return None
        return self.sight.bias(table_HR)

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: Array | None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """As `Path`."""
        return attend(
            query_BTHK, key_BSHK, value_BSHK, prepared, self.mask_BTS, dropout_rate, dropout_key
        )


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

    def prepare(self, table_HR: Array | None) -> Array | None:
        """A strip, [H, size, distances], column x at distance x - `_shift` from the first query."""
        if table_HR is None:
            return None
        own_keys = self.sight.key_segments_BS.shape[1] - self.sight.prefix
        distances_X = jnp.arange(own_keys + self._shift) - self._shift
        return self.sight.own_bias(table_HR, jnp.arange(self.size), distances_X)

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: Array | None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """As `Path`; a chunk draws its dropout from the key folded with its first position."""

        def chunk(arguments: tuple[Array, Array, Array]) -> Array:
            first, query_BCHK, segments_BC = arguments
            bias_HCS = None
            if prepared is not None:
                own_keys = key_BSHK.shape[1] - self.sight.prefix
                bias_HCS = self.sight.before_prefix(
                    jax.lax.dynamic_slice_in_dim(prepared, self._shift - first, own_keys, axis=2)
                )
            mask_BCS = self.sight.mask(first, segments_BC)
            key = fold_key(dropout_key, first)
            return attend(query_BCHK, key_BSHK, value_BSHK, bias_HCS, mask_BCS, dropout_rate, key)

        first_C = jnp.arange(self.count) * self.size
        chunks = (first_C, self._split(query_BTHK), self._split(self.sight.query_segments_BT))
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


PATHS: dict[str, type[Plain] | type[Chunked]] = {"plain": Plain, "chunked": Chunked}


def choose(attention: str, sight: Sight) -> Path:
    """The path for these rows.

    Args:
      attention: `Compute.attention`; "auto" takes chunks where there are at least two of them and
        rows are long for the platform.
    """
    if attention != "auto":
        return PATHS[attention](sight)
    queries, keys = sight.query_segments_BT.shape[1], sight.key_segments_BS.shape[1]
    long = keys >= LONG.get(jax.default_backend(), LONG["gpu"])
    return Chunked(sight) if long and queries > CHUNK else Plain(sight)
