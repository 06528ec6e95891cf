"""Rematerialisation: what each policy computes again, what it keeps, and that results are the same.

The traced step tells all of it: its matmuls, and what the loop over layers hands to the loop back.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
import pytest
import tiny

from benchmarks.common import Shapes, make_step, random_batch
from jaxprompt.planning.flops import equations, matmul_flops, step_terms
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.config import REMAT_POLICIES, Compute, T5Config
from jaxprompt.t5.remat import BESIDE, CHEAP_TO_PROJECT, KEPT, crosses_at_once, kept_bytes, settled

CONFIG = dataclasses.replace(tiny.CONFIG, num_layers=5, num_decoder_layers=3)
SHAPES = Shapes(rows=2, tokens=6, slots=3, targets=4)
D, X, F = CONFIG.d_model, CONFIG.num_heads * CONFIG.d_kv, CONFIG.d_ff
ROWS, ENCODER, DECODER = SHAPES.rows, SHAPES.encoder, SHAPES.targets
LAYERS = {"encoder": CONFIG.num_layers, "decoder": CONFIG.num_decoder_layers}


@functools.cache
def traced(remat: str, attention: str, config: T5Config = CONFIG) -> Any:
    compute = Compute(scan_unroll=1, remat=remat, attention=attention)
    step = make_step(config, compute, random_batch(config, SHAPES), optimizer=optax.sgd(0.1))
    return jax.make_jaxpr(step.run)(step.state, step.frozen, step.batch)


def flops_again(remat: str, attention: str, config: T5Config = CONFIG) -> float:
    """FLOPs of matmuls over those of the same step without rematerialisation."""
    return matmul_flops(traced(remat, attention, config)) - matmul_flops(
        traced("none", attention, config)
    )


def forward_flops(config: T5Config, shares: Mapping[str, float]) -> float:
    """So much of the forward pass of some of a step's matmuls."""
    terms = {term.name: term.forward for term in step_terms(config, ROWS, ENCODER, DECODER)}
    return sum(share * terms[name] for name, share in shares.items())


INTO_ATTENTION = {
    "encoder attention projections": 3 / 4, "decoder self-attention projections": 3 / 4,
    "cross-attention query": 1, "cross-attention key and value": 1,
}  # fmt: skip
OUT_OF_ATTENTION = {
    "encoder attention projections": 1 / 4, "decoder self-attention projections": 1 / 4,
    "cross-attention out": 1,
}  # fmt: skip
PRODUCTS = {
    "encoder scores and context": 1, "decoder self scores and context": 1,
    "cross scores and context": 1,
}  # fmt: skip


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_what_is_computed_again(gated: bool):
    """Attention in chunks computes its scores again whatever the policy."""
    config = dataclasses.replace(CONFIG, gated=gated)
    again = functools.partial(flops_again, attention="chunked", config=config)
    into_mlp = dict.fromkeys(("encoder mlp", "decoder mlp"), 2 / 3 if gated else 1 / 2)
    attention = forward_flops(config, INTO_ATTENTION)
    mlp = forward_flops(config, into_mlp)
    rest = forward_flops(config, OUT_OF_ATTENTION) + forward_flops(config, PRODUCTS)
    assert again("frozen") == 0
    assert again("frozen_mlp") == attention
    assert again("frozen_attention") == mlp
    assert again("full") == attention + mlp + rest


@pytest.mark.parametrize("attention", ["plain", "windowed"])
def test_no_weight_is_multiplied_again_where_all_is_kept(attention: str):
    """Of a whole row's attention the scores are not kept: they are its largest part."""
    scores = {"plain": 1 / 2, "windowed": 0}[attention]
    want = forward_flops(CONFIG, dict.fromkeys(PRODUCTS, scores))
    assert flops_again("frozen", attention) == want


@functools.cache
def kept(remat: str, attention: str) -> dict[str, int]:
    """Numbers that the loop over a stack's layers leaves for the backward pass."""
    found = {}
    for equation, _ in equations(traced(remat, attention)):
        if equation.primitive.name == "scan":
            stack = next((n for n, c in LAYERS.items() if c == equation.params["length"]), None)
            results = equation.outvars[equation.params["num_carry"] :]
            if stack and stack not in found:
                found[stack] = sum(result.aval.size for result in results)
    return found


def test_only_what_activation_gradients_need_is_kept():
    encoder, decoder = ROWS * ENCODER, ROWS * DECODER
    want = {
        "full": (D, D),
        "frozen_mlp": (2 * D + 2 * F, 3 * D + 2 * F),
        "frozen_attention": (2 * D + 3 * X, 3 * D + 4 * X),
        "frozen": (2 * D + 3 * X + 2 * F, 3 * D + 4 * X + 2 * F),
    }
    for remat, (at_encoder, at_decoder) in want.items():
        crossed = 0 if remat in ("full", "frozen_mlp") else 2 * X * encoder
        got = kept(remat, "windowed")
        assert got["encoder"] == LAYERS["encoder"] * encoder * at_encoder, remat
        assert got["decoder"] == LAYERS["decoder"] * (decoder * at_decoder + crossed), remat
        for stack, numbers in kept("none", "windowed").items():
            assert got[stack] < numbers, remat
        if remat in KEPT:  # what "auto" reckons with, in float32
            reckoned = kept_bytes(remat, Compute(), CONFIG, ROWS, ENCODER)
            assert reckoned == 4 * (got["encoder"] + LAYERS["decoder"] * crossed)


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "plain"])
def test_auto_keeps_most_of_what_fits(gated: bool):
    config = dataclasses.replace(CONFIG, gated=gated, d_model=CHEAP_TO_PROJECT + 4)
    mesh = make_mesh(2, 2)

    bfloat16 = Compute("bfloat16")

    def policy(room: float | None, config: T5Config = config) -> str:
        auto = dataclasses.replace(bfloat16, remat="auto", room=room)
        return settled(auto, config, 8, 64).remat

    assert policy(None) == "none"
    assert policy(0) == "full"
    needed = {remat: BESIDE * kept_bytes(remat, bfloat16, config, 8, 64) for remat in KEPT}
    for room in (*needed.values(), *(least - 1 for least in needed.values())):
        fitting = [remat for remat, least in needed.items() if least <= room]
        assert policy(room) == [*fitting, "full"][0]
    small = dataclasses.replace(config, d_model=CHEAP_TO_PROJECT)
    assert policy(1e12, small) == "frozen_mlp" and policy(1e12) == "frozen"
    assert policy(BESIDE * kept_bytes("frozen_mlp", bfloat16, small, 8, 64) - 1, small) == "full"
    divided = Compute("bfloat16", remat="auto", room=1e12, mesh=mesh)
    assert settled(divided, small, 8, 64).remat == "frozen"
    whole = kept_bytes("frozen", Compute(mesh=mesh), config, 8, 64)
    parts = kept_bytes("frozen", Compute(mesh=mesh, rows_over_model=True), config, 8, 64)
    assert 2 * whole < kept_bytes("frozen", Compute(), config, 8, 64) == 4 * parts
    odd = Compute(mesh=mesh, rows_over_model=True)
    assert kept_bytes("frozen", odd, config, 6, 64) == whole * 6 / 8  # 6 rows do not divide by 4
    assert settled(Compute(remat="full", room=1e9), config, 8, 64).remat == "full"


@functools.cache
def step_result(remat: str, platform: str = "cpu") -> Any:
    """Loss, gradient norm and the prompt after a step of SGD, as it is computed on `platform`."""
    draw = np.random.default_rng(4)
    compute = Compute(scan_unroll=1, remat=remat, attention="chunked")
    step = make_step(
        CONFIG, compute, random_batch(CONFIG, SHAPES), params=tiny.make_params(CONFIG),
        prompt_PD=draw.normal(size=(SHAPES.slots, D)).astype(np.float32), optimizer=optax.sgd(1.0),
    )  # fmt: skip
    with mock.patch.object(Compute, "platform", platform):
        state, metrics = jax.jit(step.run)(step.state, step.frozen, step.batch)
    return jax.tree.map(np.asarray, (state.trained, metrics))


def assert_same(got: Any, want: Any) -> None:
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-6, atol=1e-6), got, want)


@pytest.mark.parametrize("remat", ["auto", *REMAT_POLICIES])
def test_policies_change_no_result(remat: str):
    assert_same(step_result(remat), step_result("none"))


def test_keys_and_values_of_all_layers_at_once_change_no_result():
    assert_same(step_result("frozen", "tpu"), step_result("none"))


def test_keys_and_values_are_made_at_once_where_they_are_kept():
    platform = mock.patch.object(Compute, "platform", "tpu")
    with platform:
        kept_anyway = [remat for remat in REMAT_POLICIES if crosses_at_once(Compute(remat=remat))]
    assert kept_anyway == ["none", "frozen", "frozen_attention", "dots"]
    assert not crosses_at_once(Compute(remat="frozen"))
