"""Prompt methods against the code of their authors and of others: answers kept, and torch."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import peft_cases
import pytest
import tiny
from method_cases import (
    CASES,
    PARAMS,
    config_of,
    examples_of,
    inputs_of,
    make,
    packed,
    shaken,
    values_of,
)

from jaxprompt import steps, trees
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import METHODS, MethodInputs
from jaxprompt.t5.config import Compute
from jaxprompt.t5.model import T5

LOOP = Compute(scan_unroll=1)


def test_attempt_attends_as_its_code_in_torch():
    """The published forward pass of one unpacked example, in torch's own layers."""
    torch = pytest.importorskip("torch")
    config, batch = config_of("attempt"), tiny.make_batch([examples_of("attempt", 1)], 14, 6, 1)
    v = {name: torch.tensor(np.asarray(value)) for name, value in shaken(config).items()}
    there = (np.asarray(batch.encoder_slots_BS) < 0) & (np.asarray(batch.encoder_segments_BS) > 0)
    ids = np.asarray(batch.encoder_ids_BS)[there]
    embeds = torch.tensor(np.asarray(PARAMS["token_embedder"]["embedding"])[ids])[None]
    prompts = torch.cat([v["sources"], v["prompt"][None]])[None]
    functional = torch.nn.functional
    x = functional.silu(functional.linear(embeds.max(1).values, v["down"].T))
    x = functional.linear(x, v["up"].T)
    x = functional.layer_norm(x, x.shape[-1:], v["scale"][0, 0], v["bias"][0, 0])
    scores = prompts.max(2).values.bmm(x[..., None])[..., 0] / config.temperature
    want = torch.einsum("bp,bpld->bld", torch.softmax(scores, -1), prompts) + v["prompt"]
    values = values_of(make("attempt"), inputs_of(batch))
    np.testing.assert_allclose(values.encoder, want.numpy(), rtol=1e-5, atol=1e-6)


GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("case", ["residual", "residual plain"])
def test_residual_prompts_are_those_of_the_authors_code(case: str):
    with np.load(GOLDEN / "authors.npz") as golden:
        kept = {
            name.removeprefix(f"{case}/"): golden[name]
            for name in golden
            if name.startswith(f"{case}/")
        }
    linear = {"down": "module.0", "up": "module.2"}
    values = {"prompt": kept["prompt"]}
    for ours, theirs in linear.items():
        values[ours] = kept[f"{theirs}.weight"].T[None]
        values[f"{ours}_bias"] = kept[f"{theirs}.bias"][None]
    if case == "residual":
        values |= {"scale": kept["module.3.weight"][None], "bias": kept["module.3.bias"][None]}
    config = config_of(case)
    assert set(values) == set(shaken(config))
    values = {name: jnp.asarray(value) for name, value in values.items()}
    made = METHODS["residual"].make(values, config)
    found = values_of(made, inputs_of(packed(case))).encoder
    np.testing.assert_allclose(found, kept["made"][None], rtol=1e-5, atol=1e-5)


def test_smop_picks_as_the_authors_code_does_for_each_row_alone():
    with np.load(GOLDEN / "authors.npz") as golden:
        kept = {name.removeprefix("smop/"): golden[name] for name in golden}
    prompts, length = CASES["smop"]["prompts"], CASES["smop"]["length"]
    values = {
        "prompts": kept["embedding.weight"].reshape(prompts, length, -1),
        "router": kept["router.0.weight"].T,
    }
    values = {name: jnp.asarray(value) for name, value in values.items()}
    mask_BS, zeros_BG = jnp.asarray(kept["mask"]), jnp.zeros((4, 1), jnp.int32)
    inputs = MethodInputs(
        jnp.asarray(kept["embeds"]), -jnp.ones_like(mask_BS), mask_BS, zeros_BG, None, zeros_BG
    )
    found = values_of(METHODS["smop"].make(values, config_of("smop")), inputs)
    picked = np.asarray(found.encoder)[np.asarray(found.prompt_index_BG)[:, 0]]
    np.testing.assert_allclose(picked, kept["made"], rtol=1e-5, atol=1e-6)


def test_prefix_tuning_is_that_of_adapters():
    """Three networks with tanh, for encoder, decoder and cross-attention; H K is not d_model."""
    sizes = peft_cases.BACKBONES["shallow decoder"]
    assert sizes.num_heads * sizes.d_kv != sizes.d_model
    with np.load(GOLDEN / "adapters.npz") as golden:
        kept = dict(golden)
    values = {}
    for place, name in (("encoder", "encoder"), ("decoder", "self"), ("cross", "cross")):
        prompt, up, up_bias, out, out_bias = (
            kept[f"{name}_prefix.{part}"]
            for part in ("wte.weight", "control_trans.0.weight", "control_trans.0.bias",
                         "control_trans.2.weight", "control_trans.2.bias")
        )  # fmt: skip
        # there keys and values of a layer stand side by side: [N, 2, H, K]
        shape = (-1, 2, sizes.num_heads, sizes.d_kv)
        out = np.moveaxis(out.T.reshape(len(out.T), *shape), 1, 2)
        out_bias = np.moveaxis(out_bias.reshape(shape), 0, 1)
        parts = {"prompt": prompt, "up": up.T, "up_bias": up_bias, "out": out, "out_bias": out_bias}
        values |= {f"{place}_{part}": jnp.asarray(value) for part, value in parts.items()}
    config = config_of("prefix", length=peft_cases.LENGTH, hidden=7)
    count = METHODS["prefix"].parameters(config, sizes)
    assert count == sum(value.size for value in values.values())
    params = trees.map_with_path(
        lambda path, leaf: jnp.zeros_like(leaf) if "relpos_bias" in path else leaf,
        tiny.make_params(sizes, seed=3),
    )
    decoded = [
        [tiny.Example(ids[ids > 0].tolist(), [*targets[1:], 1])]
        for ids, targets in zip(
            peft_cases.ENCODER_IDS, peft_cases.DECODER_IDS.tolist(), strict=True
        )
    ]
    batch = tiny.make_batch(decoded, 6, 5, 1)
    np.testing.assert_array_equal(batch.decoder_ids_BT, peft_cases.DECODER_IDS)
    backbone, run = T5(sizes, params, LOOP), jax.jit(steps.logits, static_argnums=0)
    for louder in (1.0, 0.0):
        scaled = {name: louder * value for name, value in values.items()}
        own = trees.split(PromptedT5(backbone, METHODS["prefix"].make(scaled, config)))
        apart = np.abs(np.asarray(run(*own, batch)) - kept["logits"]).max()
        assert (apart < 1e-5) if louder else (apart > 0.1)
