"""Where slots stand in rows, and what stands there: trained embeddings, later hidden states.

Whatever the layout, slots are filled by one gather; `t5.model` and `t5.decode` call it.
"""

import dataclasses

import jax.numpy as jnp

from jaxprompt.typing import Array, LayerSlots


@dataclasses.dataclass(frozen=True)
class SlotPlaces:
    """The slots of a batch's rows.

    Attributes:
      slots_BS: slot index or -1 (a token stays).
      segments_BS: segment ids; they pick the prompt through `prompt_index_BG`.
      scale_BSD: float, what values are multiplied by where they stand (dropout); None = by 1.
    """

    slots_BS: Array
    segments_BS: Array
    prompt_index_BG: Array
    scale_BSD: Array | None = None

    @property
    def prompts_BS(self) -> Array:
        """Which prompt each position's segment uses, int32."""
        segment_BS = jnp.maximum(self.segments_BS - 1, 0)
        return jnp.take_along_axis(self.prompt_index_BG, segment_BS, axis=1)

    def fill(self, x_BSD: Array, values_QPD: Array, adds_Q: Array | None = None) -> Array:
        """Puts the values of Q prompts, any float dtype, where slots stand.

        Args:
          x_BSD: embeddings or hidden states.
          adds_Q: bool, to add a prompt's values to what is there; None = they replace it.
        Returns: [B, S, D] in the dtype of `x_BSD`.
        """
        prompts, slots, d_model = values_QPD.shape
        prompts_BS = self.prompts_BS
        row_BS = prompts_BS * slots + jnp.maximum(self.slots_BS, 0)
        slot_BSD = values_QPD.astype(x_BSD.dtype).reshape(prompts * slots, d_model)[row_BS]
        if self.scale_BSD is not None:
            slot_BSD = slot_BSD * self.scale_BSD.astype(x_BSD.dtype)
        if adds_Q is not None:
            slot_BSD = jnp.where(adds_Q[prompts_BS][..., None], x_BSD + slot_BSD, slot_BSD)
        return jnp.where(self.slots_BS[..., None] >= 0, slot_BSD, x_BSD)


def of_all_layers(slots: LayerSlots | None) -> tuple[Array, Array] | None:
    """What `SlotPlaces.fill` takes in each of N layers: values [N, Q, P, D] and adds, bool [N, Q].

    The first layer, whose slots are embeddings, adds zeros.
    """
    if slots is None:
        return None
    values = jnp.pad(slots.values, ((1, 0), (0, 0), (0, 0), (0, 0)))
    is_first_N = jnp.arange(len(values)) == 0
    return values, slots.adds_Q[None] | is_first_N[:, None]
