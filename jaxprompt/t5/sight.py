"""Who sees whom in the rows of a batch; masks and relative biases are made from it.

Called by `t5.model` and by the paths of attention.
"""

import dataclasses

import jax
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
      prefix: how many keys are of prefixes; none of them is in a query's future.
      before_text: P, if each segment's prefix stands at the P positions before it; 0 = prefixes
        stand nowhere, so have no bias.
      causal: whether the row's own keys after a query are hidden from it.
      max_distance: of the relative bias.
    """

    query_segments_BT: Array
    key_segments_BS: Array
    prefix: int = 0
    before_text: int = 0
    causal: bool = False
    max_distance: int = 128

    def behind_prefix(
        self,
        slots: int,
        prompt_index_BG: Array,
        mask_QP: Array | None = None,
        before_text: bool = False,
    ) -> "Sight":
        """The same with G*P keys in front, which `attention.with_prefix` puts there.

        Args:
          slots: P.
          prompt_index_BG: which of the Q prompts a segment uses.
          mask_QP: bool, False where a prompt has no such slot.
          before_text: whether a segment's P keys stand at the positions before it.
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
            before_text=slots if before_text else 0,
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
        """float32 [H, T, S] or [B, H, T, S] of all queries; see `behind_bias`."""
        positions_T, positions_S = self._positions(0, self.query_segments_BT.shape[1])
        own_HTS = self.own_bias(table_HR, positions_T, positions_S[self.prefix :])
        return self.behind_bias(own_HTS, self.prefix_bias(table_HR), self.places())

    def own_bias(self, table_HR: Array, positions_T: Array, positions_S: Array) -> Array:
        """float32 [H, T, S] of a row's own keys and queries at these positions."""
        return relative_bias(
            table_HR,
            positions_T,
            positions_S,
            bidirectional=not self.causal,
            max_distance=self.max_distance,
        )

    def prefix_bias(self, table_HR: Array) -> Array | None:
        """float32 [H, T, P] of a segment's own prefix for the query at place t of the segment."""
        if not self.before_text:
            return None
        places_T = jnp.arange(self.query_segments_BT.shape[1])
        return self.own_bias(table_HR, places_T, jnp.arange(self.before_text) - self.before_text)

    def places(self) -> Array | None:
        """int32 [B, T], where in its segment each query stands; None where no bias asks."""
        if not self.before_text:
            return None
        segments_BT = self.query_segments_BT
        positions_BT = jnp.broadcast_to(jnp.arange(segments_BT.shape[1])[None], segments_BT.shape)
        begins_BT = jnp.diff(segments_BT, axis=1, prepend=0) != 0
        return positions_BT - jax.lax.cummax(jnp.where(begins_BT, positions_BT, 0), axis=1)

    def behind_bias(
        self, own_HTS: Array, prefix_HTP: Array | None, places_BT: Array | None
    ) -> Array:
        """The bias of some queries at a row's own keys, behind that at the keys of prefixes.

        Args:
          own_HTS: of the row's own keys.
          prefix_HTP: from `prefix_bias`.
          places_BT: where in their segments these queries stand.
        Returns: [H, T, S], zeros in front, where prefixes stand nowhere; else [B, H, T, S], all
          segments' prefixes alike: a query sees its own.
        """
        if prefix_HTP is None or places_BT is None:
            return jnp.pad(own_HTS, ((0, 0), (0, 0), (self.prefix, 0)))
        prefix_BHTP = jnp.moveaxis(prefix_HTP[:, places_BT], 0, 1)
        prefixes_BHTX = jnp.tile(prefix_BHTP, self.prefix // self.before_text)
        own_BHTS = jnp.broadcast_to(own_HTS[None], (len(places_BT), *own_HTS.shape))
        return jnp.concatenate([prefixes_BHTX, own_BHTS], axis=3)

    def _positions(self, first: Array | int, queries: int) -> tuple[Array, Array]:
        keys = self.key_segments_BS.shape[1]
        return first + jnp.arange(queries), jnp.arange(keys) - self.prefix
