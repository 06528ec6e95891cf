"""A prompt bank: every segment gets its own prompt's values, whatever else is in the bank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx

from jaxprompt import trees
from jaxprompt.losses import cross_entropy, segment_sums
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import MethodInputs, NoPrompt, PromptMethod
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5.config import Compute
from jaxprompt.t5.model import T5
from jaxprompt.typing import Array, Batch, KeysValues, PromptValues, UserError

CONFIG = tiny.CONFIG
LENGTHS = (2, 4, 3)
LOOP = Compute(scan_unroll=1)


class Everything(PromptMethod):
    """Values of every kind, of one length, all trained."""

    def __init__(self, length: int, seed: int, mixed: bool = False):
        draw = np.random.default_rng(seed)

        def normal(*shape: int) -> trees.PromptParam:
            return trees.PromptParam(jnp.asarray(draw.normal(size=shape), jnp.float32))

        count = 2 if mixed else 1
        self.mixed = mixed
        self.encoder = normal(count, length, CONFIG.d_model)
        self.decoder = normal(count, length, CONFIG.d_model)
        self.delta = normal(CONFIG.d_model)
        for name, layers in (("self", CONFIG.num_layers), ("cross", CONFIG.num_decoder_layers)):
            shape = (layers, count, length, CONFIG.num_heads, CONFIG.d_kv)
            setattr(self, f"{name}_keys", normal(*shape))
            setattr(self, f"{name}_values", normal(*shape))

    def __call__(self, inputs: MethodInputs) -> PromptValues:
        index = jnp.ones_like(inputs.prompt_index_BG) if self.mixed else None
        return PromptValues(
            encoder=self.encoder[...],
            decoder=self.decoder[...],
            encoder_self=KeysValues(
                self.self_keys[...], self.self_values[...], before_text=self.mixed
            ),
            decoder_cross=KeysValues(self.cross_keys[...], self.cross_values[...]),
            input_delta=jnp.ones_like(inputs.embeds_BSD) * self.delta[...].reshape(1, 1, -1),
            prompt_index_BG=index,
        )


def losses(method: PromptMethod, batch: Batch) -> tuple[Array, dict]:
    """Loss of each segment [B, G], and the gradient of their weighted sum by prompt."""
    model = PromptedT5(T5(CONFIG, tiny.make_params(), LOOP), method)
    graphdef, trained, frozen = trees.split(model)

    def of(trained: dict) -> tuple[Array, Array]:
        logits = trees.merge(graphdef, trained, frozen)(batch)
        loss_BT = cross_entropy(logits, batch.targets_BT) * batch.loss_weights_BT
        segments = batch.example_index_BG.shape[1]
        loss_BG = segment_sums(loss_BT, batch.decoder_segments_BT, segments)
        return jnp.sum(loss_BG), loss_BG

    grads, loss_BG = jax.jit(jax.grad(of, has_aux=True))(trained)
    return np.asarray(loss_BG), grads["method"]


def own_examples(number: int, count: int = 3) -> list[tiny.Example]:
    """Examples for one prompt, with its own number of slots."""
    length = LENGTHS[number]
    examples = tiny.make_examples(count, length, seed=number, decoder_slots=length)
    return [dataclasses.replace(example, prompt=number) for example in examples]


@pytest.mark.parametrize("mixed", [False, True])
def test_packed_rows_of_a_bank_equal_each_prompt_alone(mixed: bool):
    """Losses and gradients, prompts of three lengths, values of every kind."""
    methods = [Everything(length, seed, mixed) for seed, length in enumerate(LENGTHS)]
    examples = [own_examples(number) for number in range(3)]
    rows = [[examples[number][place] for number in order] for place, order in
            enumerate(((0, 1, 2), (2, 0, 1), (1, 2, 0)))]  # fmt: skip
    packed = tiny.make_batch(rows, 40, 24, 3)
    packed_BG, bank_grads = losses(PromptBank(methods), packed)
    for number, method in enumerate(methods):
        alone = [dataclasses.replace(example, prompt=0) for example in examples[number]]
        batch = tiny.make_batch([[example] for example in alone], 14, 10, 1)
        loss_BG, grads = losses(method, batch)
        found = packed_BG[np.asarray(packed.prompt_index_BG) == number]
        np.testing.assert_allclose(np.sort(found), np.sort(loss_BG[:, 0]), atol=2e-5, rtol=1e-5)
        own = trees.flatten(bank_grads["prompts"][f"{number:04d}"])
        for path, grad in trees.flatten(grads).items():
            np.testing.assert_allclose(own[path], grad, atol=2e-5, rtol=2e-4, err_msg=path)
            assert np.abs(grad).max() > 0


def test_the_bare_backbone_has_a_place_in_a_bank():
    prompt = SoftPrompt(jnp.asarray(np.random.default_rng(0).normal(size=(3, 12)), jnp.float32))
    bare = tiny.make_examples(2, 0)
    slots = [dataclasses.replace(e, prompt=1) for e in tiny.make_examples(2, 3, seed=4)]
    rows = [list(pair) for pair in zip(bare, slots, strict=True)]
    together, _ = losses(PromptBank([NoPrompt(), prompt]), tiny.make_batch(rows, 16, 8, 2))
    alone, _ = losses(prompt, tiny.make_batch(
        [[dataclasses.replace(e, prompt=0)] for e in slots], 8, 4, 1))  # fmt: skip
    np.testing.assert_allclose(together[:, 1], alone[:, 0], atol=1e-5)
    nothing, _ = losses(PromptBank([prompt]), tiny.make_batch([[e] for e in bare], 8, 4, 1))
    np.testing.assert_allclose(together[:, 0], nothing[:, 0], atol=1e-5)


def test_prompts_of_different_methods_share_no_bank():
    with pytest.raises(UserError, match="different methods cannot share a bank: Everything, Soft"):
        PromptBank([SoftPrompt(jnp.ones((2, 12))), Everything(2, 0)])


def test_a_bank_is_a_module_whose_parameters_are_the_prompts():
    bank = PromptBank([SoftPrompt(jnp.full((n, 12), float(n))) for n in (1, 2)])
    _, trained, _ = trees.split(bank)
    shapes = {path: leaf.shape for path, leaf in trees.flatten(trained).items()}
    assert shapes == {"prompts/0000/prompt": (1, 12), "prompts/0001/prompt": (2, 12)}
    assert isinstance(bank, nnx.Module)
