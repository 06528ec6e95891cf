"""Who sees whom in the rows of a batch; masks and relative biases are made from it.

Called by `t5.model` and by the paths of attention.
"""

import dataclasses

import jax.numpy as jnp

from jaxprompt.t5.attention import relative_bias, segment_mask
from jaxprompt.typing import Array

NOBODY = -1  # the segment of a key that none may see


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
