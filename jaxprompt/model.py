"""PromptedT5 = frozen T5 + prompt method: batches in, logits out; made and split once."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from jaxprompt.prompts.bank import PromptBank, bank_key
from jaxprompt.prompts.base import Constant, MethodInputs, NoPrompt, PromptMethod
from jaxprompt.regularize import wayward_distance
from jaxprompt.sharding import constrain
from jaxprompt.t5 import model as t5
from jaxprompt.t5 import stepwise
from jaxprompt.t5.decode import Generated
from jaxprompt.t5.generate import generate
from jaxprompt.t5.model import T5
from jaxprompt.t5.search import Rules
from jaxprompt.t5.stepwise import Draw, Halted
from jaxprompt.typing import Array, Batch, Outputs, PromptValues

_METHOD = 2**31 - 1  # folded into keys for what a method draws


class PromptedT5(nnx.Module):
    """A backbone that is prompted.

    Args:
      backbone: the T5.
      method: whose parameters are trained; None = the bare backbone.
      teacher: a prompt that is not trained, for `taught`; in the slots of the method's.
      texts: embeddings [P, D] that training pulls a prompt's slots towards, by its number.
    """

    def __init__(
        self,
        backbone: T5,
        method: PromptMethod | None = None,
        teacher: PromptMethod | None = None,
        texts: Mapping[int, Array] | None = None,
    ):
        self.backbone = backbone
        self.method = NoPrompt() if method is None else method
        if teacher is not None:
            self.teacher = teacher
        if texts:
            self.texts = nnx.Dict({bank_key(n): Constant(text) for n, text in texts.items()})

    def __call__(
        self,
        batch: Batch,
        *,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
        prompt_dropout: float = 0.0,
        noise_BSD: Array | None = None,
    ) -> Array:
        """Logits of every decoder position, float32 [B, T, V]; arguments as of `outputs`."""
        return self.outputs(
            batch, dropout_rate=dropout_rate, dropout_key=dropout_key,
            prompt_dropout=prompt_dropout, noise_BSD=noise_BSD,
        ).logits_BTV  # fmt: skip

    def outputs(
        self,
        batch: Batch,
        *,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
        prompt_dropout: float = 0.0,
        noise_BSD: Array | None = None,
    ) -> Outputs:
        """Logits and the hidden states before them.

        Args:
          dropout_key: of dropout and of what the method draws, one or of each row [B]; None draws
            nothing.
          prompt_dropout, noise_BSD: as `t5.model.encode_batch` takes them.
        """
        values, encoded_BSD = self.encode(
            batch, dropout_rate=dropout_rate, dropout_key=dropout_key,
            prompt_dropout=prompt_dropout, noise_BSD=noise_BSD,
        )  # fmt: skip
        hidden_BTD = self.decode(
            batch, values, encoded_BSD, dropout_rate=dropout_rate, dropout_key=dropout_key
        )
        return Outputs(self.logits(hidden_BTD), encoded_BSD, hidden_BTD)

    def taught(self, batch: Batch) -> Outputs:
        """As `outputs` without dropout, with the teacher in place of the method."""
        return PromptedT5(self.backbone, self.teacher).outputs(batch)

    def prompt_values(self, batch: Batch, key: Array | None = None) -> PromptValues:
        """What the method hands the backbone for this batch.

        Args:
          key: of what it draws, one or of each row [B]; None = it draws nothing.
        """
        return self.method(self._inputs(batch, key))

    def wayward(self, batch: Batch, count: int) -> Array:
        """How far each of `count` prompts is from its text, see `regularize`; float32 [count].

        0 for a prompt without one.
        """
        inputs, method = self._inputs(batch, None), self.method
        distances = [jnp.zeros(())] * count
        for key, text in self.texts.items():
            prompt = method.prompts[key] if isinstance(method, PromptBank) else method
            slots = prompt(inputs).encoder
            assert slots is not None, "a text is for a prompt in slots"
            distances[int(key)] = wayward_distance(slots[0], text[...])
        return jnp.stack(distances)

    def _inputs(self, batch: Batch, key: Array | None) -> MethodInputs:
        embeds_BSD = t5.embed_tokens(
            self.backbone.tree(), batch.encoder_ids_BS, self.backbone.compute
        )
        return MethodInputs(
            embeds_BSD,
            batch.encoder_slots_BS,
            batch.encoder_segments_BS,
            batch.prompt_index_BG,
            None if key is None else _row_keys(key, len(embeds_BSD)),
            batch.task_index_BG,
        )

    def encode(
        self,
        batch: Batch,
        *,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
        prompt_dropout: float = 0.0,
        noise_BSD: Array | None = None,
    ) -> tuple[PromptValues, Array]:
        """Prompt values and encoder output [B, S, D]; reads only the batch's encoder fields."""
        values = self.prompt_values(batch, dropout_key)
        backbone = self.backbone
        encoded_BSD = t5.encode_batch(
            backbone.tree(), backbone.config, backbone.compute, batch, values,
            dropout_rate=dropout_rate, dropout_key=dropout_key,
            prompt_dropout=prompt_dropout, noise_BSD=noise_BSD,
        )  # fmt: skip
        return values, encoded_BSD

    def decode(
        self,
        batch: Batch,
        values: PromptValues,
        encoded_BSD: Array,
        *,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """Final decoder states [B, T, D] with teacher forcing."""
        backbone = self.backbone
        return t5.decode_batch(
            backbone.tree(), backbone.config, backbone.compute, batch, values, encoded_BSD,
            dropout_rate=dropout_rate, dropout_key=dropout_key,
        )  # fmt: skip

    def generate(self, batch: Batch, rules: Rules, draw: Draw | None = None) -> Generated:
        """Continues the beginning in the batch's decoder fields, see `t5.generate.generate`."""
        values, encoded_BSD = self.encode(batch)
        backbone = self.backbone
        return generate(
            backbone.tree(), backbone.config, backbone.compute, batch, values, encoded_BSD,
            rules, draw,
        )  # fmt: skip

    def start(self, batch: Batch, rules: Rules, draw: Draw | None = None) -> Halted:
        """The first token of a search without beams, see `t5.stepwise.start`."""
        values, encoded_BSD = self.encode(batch)
        backbone = self.backbone
        return stepwise.start(
            backbone.tree(), backbone.config, backbone.compute, batch, values, encoded_BSD,
            rules, draw,
        )  # fmt: skip

    def go_on(self, rules: Rules, halted: Halted, until: Array) -> tuple[Halted, Generated]:
        """Up to `until` tokens, and what there is then, see `t5.stepwise.go_on`."""
        backbone = self.backbone
        halted = stepwise.go_on(
            backbone.tree(), backbone.config, backbone.compute, rules, halted, until
        )
        return halted, stepwise.result(backbone.config, halted)

    def logits(self, hidden: Array) -> Array:
        """Final decoder states [B, T, D] -> float32 [B, T, V]."""
        backbone = self.backbone
        found = t5.logits(backbone.tree(), backbone.config, hidden)
        return constrain(backbone.compute.mesh, found, "batch", "length", "vocab")


def _row_keys(key: Array, rows: int) -> Array:
    """Of each row a key that the backbone's dropout does not use, [B]."""
    keys_B = key if key.ndim else jax.random.split(key, rows)
    return jax.vmap(lambda own: jax.random.fold_in(own, _METHOD))(keys_B)
