"""Teachers: trained prompts that a run's prompt is kept close to, and the distances to them.

`borrowed` reads them, `trainee` puts them in the frozen tree, `steps` adds the distances to what a
step minimises.
"""

import dataclasses

import jax
import jax.numpy as jnp

from jaxprompt.losses import segment_sums
from jaxprompt.typing import Array, Batch, Outputs, UserError


@dataclasses.dataclass(frozen=True)
class DistilConfig:
    """Trained prompts as teachers: one of another task (PANDA), or one of each task (MPT).

    PANDA (Zhong et al. 2022, arXiv 2208.10160): a squared distance between the logits that the
    prompt and the teacher's give is added to the loss of every target token, times `weight` and the
    similarity of teacher and task. The distance is that of WHU-ZQH/PANDA, with the vocabulary for
    its classes; there it is divided by the batch size once more, dropout is on in the teacher too
    and the similarity a number given by hand.

    MPT (Wang et al. 2023, arXiv 2303.02861, section 3.2): every task of the run has a teacher of
    its own; added are `kl` times KL(teacher || student) of the target tokens' distributions, both
    at `temperature`, and `hidden` times the mean squared distance of hidden states. That, and that
    its one weight counts for both, is from memory of the paper: its text was not at hand, and of
    its code only what XYaoooo/DPT kept, without distillation; so the weights here are ours. So is
    which hidden states: the last of encoder and decoder, and that KL has no factor temperature^2.

    Attributes:
      prompt: PANDA's teacher, a soft prompt of the same backbone and length; empty = none.
      weight: of its distance; the code's.
      target: a prompt trained on this run's task, whose `average-tokens` similarity to the
        teacher, as `jaxprompt transfer` tells it, scales the weight; empty = 1.
      teachers: MPT's, a soft prompt of the same backbone and length for each task, by its name.
      kl, hidden: weights of their distances; 0 = without.
      temperature: what logits are divided by before they are compared.
    """

    prompt: str = ""
    weight: float = 0.1
    target: str = ""
    teachers: dict[str, str] = dataclasses.field(default_factory=dict)
    kl: float = 1.0
    hidden: float = 1.0
    temperature: float = 1.0

    def __post_init__(self):
        for name in ("weight", "temperature"):
            if getattr(self, name) <= 0:
                raise UserError(f"distil.{name} is {getattr(self, name)}, it has to be above 0")
        if min(self.kl, self.hidden) < 0 or self.kl == self.hidden == 0:
            raise UserError(
                f"distil.kl is {self.kl} and distil.hidden {self.hidden}: neither can be negative, "
                "and one has to be above 0"
            )
        if self.target and not self.prompt:
            raise UserError("distil.target is given, but no distil.prompt to compare it with")
        if self.prompt and self.teachers:
            raise UserError(
                "distil.prompt is the only teacher of a run, distil.teachers one of each task: "
                "give one of the two"
            )

    @property
    def is_on(self) -> bool:
        """Whether there is a teacher."""
        return bool(self.prompt or self.teachers)

    @property
    def paths(self) -> list[str]:
        """The artifacts that it reads."""
        return [path for path in (self.prompt, self.target, *self.teachers.values()) if path]

    def distances(self, similarity: float = 1.0) -> "Distances":
        """What a step adds; similarity: of PANDA's teacher and the task."""
        if self.teachers:
            return Distances(kl=self.kl, hidden=self.hidden, temperature=self.temperature)
        return Distances(squared=similarity * self.weight if self.prompt else 0.0)


@dataclasses.dataclass(frozen=True)
class Distances:
    """Weights of the distances to a teacher; all 0 = there is none.

    Attributes:
      squared: of the squared distance of logits, a mean over the vocabulary.
      kl: of KL(teacher || student).
      hidden: of the squared distance of the last hidden states of encoder and decoder.
      temperature: of `kl`.
    """

    squared: float = 0.0
    kl: float = 0.0
    hidden: float = 0.0
    temperature: float = 1.0

    def __bool__(self) -> bool:
        return bool(self.squared or self.kl or self.hidden)

    def of(self, batch: Batch, own: Outputs, teacher: Outputs) -> dict[str, Array]:
        """What is added to the loss of every target token, float32 [B, T] each.

        Returns: {"distil_logits", "distil_hidden"}, weighted.
        """
        logits_BT = hidden_BT = jnp.zeros(batch.targets_BT.shape)
        if self.squared:
            apart_BTV = own.logits_BTV - teacher.logits_BTV
            logits_BT = self.squared * jnp.mean(apart_BTV**2, axis=-1)
        if self.kl:
            pair = own.logits_BTV, teacher.logits_BTV
            logits_BT = self.kl * divergence(*pair, self.temperature)
        if self.hidden:
            hidden_BT = self.hidden * hidden_distance(batch, own, teacher)
        return {"distil_logits": logits_BT, "distil_hidden": hidden_BT}


NO_TEACHER = Distances()


def divergence(logits_BTV: Array, teacher_BTV: Array, temperature: float) -> Array:
    """KL(teacher || student) of softmax(logits / temperature), in nats, float32 [B, T]."""
    log_q_BTV = jax.nn.log_softmax(logits_BTV / temperature)
    log_p_BTV = jax.nn.log_softmax(teacher_BTV / temperature)
    return jnp.sum(jnp.exp(log_p_BTV) * (log_p_BTV - log_q_BTV), axis=-1)


def hidden_distance(batch: Batch, own: Outputs, teacher: Outputs) -> Array:
    """Squared distance of last hidden states, for every target token, float32 [B, T].

    Mean over D at the token's own place in the decoder, plus the mean over D and over all positions
    of its example in the encoder, slots and text.
    """
    decoder_BT = _squares(own.decoded_BTD, teacher.decoded_BTD)
    encoder_BS = _squares(own.encoded_BSD, teacher.encoded_BSD)
    segments_BS, count = batch.encoder_segments_BS, batch.example_index_BG.shape[1]
    sums_BG = segment_sums(encoder_BS, segments_BS, count)
    positions_BG = segment_sums(jnp.ones_like(encoder_BS), segments_BS, count)
    example_BG = sums_BG / jnp.maximum(positions_BG, 1.0)
    index_BT = jnp.maximum(batch.decoder_segments_BT - 1, 0)
    return decoder_BT + jnp.take_along_axis(example_BG, index_BT, axis=1)


def _squares(x: Array, y: Array) -> Array:
    """Mean over the last axis, in float32 whatever the compute dtype."""
    return jnp.mean(jnp.square(x.astype(jnp.float32) - y.astype(jnp.float32)), axis=-1)
