"""Quantised weights: the numbers are qwix's, and a T5 of them is the float T5 they stand for."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import qwix
import searches
import tiny
from quantized_params import as_floats, quantized

from jaxprompt import quantize, sharding, trees
from jaxprompt.losses import cross_entropy
from jaxprompt.model import PromptedT5
from jaxprompt.planning.flops import equations
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import ParamSpec, abstract_params, param_specs
from jaxprompt.t5.model import T5
from jaxprompt.t5.search import Search
from jaxprompt.typing import Batch, UserError

KINDS = ("int8", "int4")
CONFIG = dataclasses.replace(tiny.CONFIG, d_model=16, num_layers=2)
FAMILIES = {
    "t5-1.0": {
        "activation": "relu", "gated": False, "tie_word_embeddings": True,
        "scale_decoder_outputs": True,
    },
    "t5-1.1": {},
    "mt5, tied": {"model_type": "mt5", "tie_word_embeddings": True},
    "umt5": {"model_type": "umt5", "per_layer_relative_bias": True},
}  # fmt: skip
LOOP = Compute(scan_unroll=1)  # compiles fastest
# the products of the model: weight, activation, axes that are summed over
PRODUCTS = {
    "bsd,dhk->bshk": ((16, 4, 5), (2, 3, 16), (0,)),
    "bthk,hkd->btd": ((4, 8, 6), (2, 3, 4, 8), (0, 1)),
    "...i,io->...o": ((16, 7), (2, 3, 16), (0,)),
    "...d,vd->...v": ((9, 16), (2, 16), (1,)),
}


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several groups in weights of this size."""
    monkeypatch.setattr(quantize, "GROUP", 8)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def coded(values: np.ndarray, inputs: tuple[int, ...], kind: str) -> Any:
    shape = quantize.scale_shape(values.shape, inputs, kind)
    scale = quantize.scales_of(values, shape, kind)
    codes = quantize.codes_of(values, quantize.spread(scale, values.shape), kind)
    return quantize.make(jnp.asarray(codes), jnp.asarray(scale))


# ---- numbers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [(0,), (0, 1), (2,)])
def test_the_numbers_are_those_of_qwix(inputs: tuple[int, ...], kind: str):
    values = normal((24, 16, 40)) * normal((1, 1, 40), seed=1)
    values[..., 3] = 0
    ours = coded(values, inputs, kind)
    tiles = {axis: values.shape[axis] // ours.scale.shape[axis] for axis in range(3)}
    theirs = qwix.quantize(
        jnp.asarray(values),
        kind,
        channelwise_axes=[axis for axis, tile in tiles.items() if tile == 1],
        tiled_axes={axis: tile for axis, tile in tiles.items() if tile > 1},
    )
    assert ours.qvalue.dtype == theirs.qvalue.dtype and ours.qtype == theirs.qtype
    np.testing.assert_allclose(ours.scale, theirs.scale, rtol=3e-7)
    apart = np.abs(np.asarray(ours.qvalue, np.int32) - np.asarray(theirs.qvalue, np.int32))
    scale = np.broadcast_to(quantize.spread(np.asarray(ours.scale), values.shape), values.shape)
    is_tie = np.abs(np.abs(values / scale) % 1 - 0.5) < 1e-4
    assert apart.max() <= 1 and not apart[~is_tie].any() and is_tie.mean() < 0.2
    error = np.abs(np.asarray(qwix.dequantize(ours)) - values)
    assert (error <= 0.5001 * scale).all()


def test_groups_of_int4():
    shape = quantize.scale_shape
    assert shape((24, 5), (0,), "int8") == (1, 5)
    assert shape((24, 5), (0,), "int4") == (3, 5)
    assert shape((21, 5), (0,), "int4") == (3, 5)  # 7 at a time, the most that divides
    assert shape((4, 16, 5), (0, 1), "int4") == (4, 2, 5)
    assert shape((4, 16, 5), (0, 1), "int8") == (1, 1, 5)


def test_parts_of_transposed_weights_are_quantised_without_being_copied_first():
    values = normal((7, 16))
    for kind in KINDS:
        straight, turned = coded(values, (1,), kind), coded(values.T, (0,), kind)
        np.testing.assert_array_equal(straight.qvalue, turned.qvalue.T)
        np.testing.assert_array_equal(straight.scale, turned.scale.T)


def test_an_unknown_kind_is_refused():
    quantize.check_kind(None)
    with pytest.raises(UserError, match="quantize is 'int2'; it can be none, int8, int4"):
        quantize.check_kind("int2")


# ---- products --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", PRODUCTS)
def test_products_and_their_gradients_are_those_of_the_float_weight(spec: str, kind: str):
    shape, x_shape, inputs = PRODUCTS[spec]
    weight, x = coded(normal(shape), inputs, kind), jnp.asarray(normal(x_shape, seed=1))
    assert any(weight.scale.shape[axis] > 1 for axis in inputs) == (kind == "int4")
    floats = as_floats({"w": weight})["w"]
    cotangent = jnp.asarray(normal(np.einsum(spec, normal(x_shape), normal(shape)).shape, seed=2))

    def loss(x: jax.Array, weight: Any) -> tuple[jax.Array, jax.Array]:
        product = quantize.einsum(spec, x, weight)
        return jnp.sum(product * cotangent), product

    found, product = jax.jit(jax.grad(loss, has_aux=True))(x, weight)
    wanted, wanted_product = jax.jit(jax.grad(loss, has_aux=True))(x, floats)
    for ours, theirs in ((found, wanted), (product, wanted_product)):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * np.abs(theirs).max())


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_products_neither_overflow_nor_lose_more_than_a_rounding(kind: str):
    """int8 codes alone sum to 512 * 4 * 127, four times the largest float16."""
    weight = coded(np.abs(normal((512, 8))) + 1, (0,), kind)
    x = np.full((2, 512), 4, np.float32)
    exact = x @ as_floats({"w": weight})["w"]
    for dtype, digits in (("float16", 2**-10), ("bfloat16", 2**-7)):
        product = quantize.einsum("...i,io->...o", jnp.asarray(x, dtype), weight)
        assert product.dtype == dtype
        np.testing.assert_allclose(product.astype(np.float32), exact, rtol=2 * digits)
        logits = quantize.einsum("...i,io->...o", jnp.asarray(x, dtype), weight, jnp.float32)
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, exact, rtol=digits)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_table(kind: str):
    table = coded(normal((9, 16)), (1,), kind)
    ids = jnp.asarray([[3, 0], [8, 3]])
    floats = as_floats({"t": table})["t"]
    np.testing.assert_array_equal(quantize.take(table, ids, "float32"), floats[ids])
    assert quantize.take(table, ids, "bfloat16").dtype == jnp.bfloat16
    np.testing.assert_array_equal(quantize.take(floats, ids, "float32"), floats[ids])


# ---- the tree --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_matrices_are_quantised_and_nothing_else(family: str, kind: str):
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    specs, floats = trees.flatten(param_specs(config, kind)), trees.flatten(param_specs(config))
    assert specs.keys() == floats.keys()
    for path, spec in specs.items():
        is_matrix = path.endswith(("/kernel", "token_embedder/embedding"))
        assert quantize.is_quantized(spec) == is_matrix, path
        if not is_matrix:
            assert spec == floats[path]
            continue
        assert spec.qvalue == dataclasses.replace(floats[path], dtype=spec.qtype)
        assert spec.qtype == (kind if "/layers/" in path else "int8")
        summed = [axis for axis, name in enumerate(spec.scale.axes) if name == "groups"]
        assert summed == list(floats[path].inputs)
        for axis in set(range(len(spec.scale.shape))) - {*summed}:
            assert spec.scale.shape[axis] == floats[path].shape[axis], path
    abstract = abstract_params(config, "bfloat16", kind)
    assert trees.count(abstract) == trees.count(abstract_params(config))
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(abstract)}
    assert dtypes == {"int8", kind, "float32", "bfloat16"}


def test_xxl_takes_half_and_a_bit_more_than_a_quarter_of_bfloat16(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quantize, "GROUP", 128)
    xxl = T5Config(d_model=4096, d_ff=10240, num_layers=24, num_decoder_layers=24, num_heads=64)
    sizes = [
        trees.size_in_bytes(abstract_params(xxl, "bfloat16", kind)) / 2**30
        for kind in ("none", *KINDS)
    ]
    np.testing.assert_allclose(sizes, [20.74, 10.38, 5.66], atol=0.01)


@pytest.mark.parametrize("over_data", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_divided_as_the_weight_and_scales_as_its_outputs(kind: str, over_data: bool):
    mesh = sharding.make_mesh(2, 4)
    floats = trees.flatten(sharding.tree_shardings(mesh, param_specs(CONFIG), over_data))
    specs = param_specs(CONFIG, kind)
    shardings = sharding.tree_shardings(mesh, specs, over_data)
    for path, spec in trees.flatten(param_specs(CONFIG)).items():
        if not spec.inputs:
            continue
        found = trees.flatten(shardings)[path]
        assert found.qvalue == floats[path], path
        outputs = [None if n in spec.inputs else name for n, name in enumerate(floats[path].spec)]
        assert list(found.scale.spec) == outputs, path
    placed = jax.device_put(quantized(tiny.make_params(CONFIG), CONFIG, kind), shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, placed) == shardings


# ---- the model -------------------------------------------------------------------------------


@functools.cache
def make_batch(config: T5Config, prompts: int = 1) -> Batch:
    """Packed rows of one to three segments."""
    examples = tiny.make_examples(6, 3, prompts)
    return tiny.make_batch([examples[:3], examples[3:5], examples[5:]], 24, 10, 3)


def soft(seed: int, length: int = 3, width: int = CONFIG.d_model) -> SoftPrompt:
    return SoftPrompt(jnp.asarray(normal((length, width), seed)))


@functools.cache
def program(config: T5Config, compute: Compute, prompts: int) -> Any:
    """(trained, frozen) -> gradient of the loss by the prompts, logits; one for every kind."""
    batch = make_batch(config, prompts)
    graphdef = parts(tiny.make_params(config), config, compute, prompts)[0]

    def loss(trained: dict, frozen: dict) -> tuple[jax.Array, jax.Array]:
        logits = trees.merge(graphdef, trained, frozen)(batch)
        return jnp.sum(cross_entropy(logits, batch.targets_BT) * batch.loss_weights_BT), logits

    return jax.jit(jax.grad(loss, has_aux=True))


def parts(params: dict, config: T5Config, compute: Compute, prompts: int) -> tuple:
    method = soft(1) if prompts == 1 else PromptBank([soft(seed) for seed in range(prompts)])
    return trees.split(PromptedT5(T5(config, params, compute), method))


def answers(
    params: dict, config: T5Config = CONFIG, compute: Compute = LOOP, prompts: int = 1
) -> tuple[np.ndarray, dict]:
    """Logits where there are targets, and the gradient of the loss by the prompts."""
    _, trained, frozen = parts(params, config, compute, prompts)
    grads, logits = program(config, compute, prompts)(trained, frozen)
    weights_BT = make_batch(config, prompts).loss_weights_BT
    return np.asarray(logits)[weights_BT > 0], trees.flatten(grads)


def assert_same(ours: tuple[np.ndarray, dict], theirs: tuple[np.ndarray, dict]) -> None:
    np.testing.assert_allclose(ours[0], theirs[0], atol=2e-5, rtol=1e-5)
    for path, grad in theirs[1].items():
        assert np.abs(grad).max() > 1e-3
        np.testing.assert_allclose(ours[1][path], grad, atol=2e-5 * np.abs(grad).max())


@functools.cache
def coded_params(kind: str, config: T5Config = CONFIG) -> dict:
    return quantized(tiny.make_params(config), config, kind)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_t5_of_codes_is_the_t5_that_they_stand_for(family: str, kind: str):
    """Packed rows, logits and gradients; and near the T5 that was quantised."""
    config = dataclasses.replace(CONFIG, **FAMILIES[family])
    params = coded_params(kind, config)
    ours = answers(params, config)
    assert_same(ours, answers(as_floats(params), config))
    logits, _ = answers(tiny.make_params(config), config)
    off = np.sqrt(np.mean((ours[0] - logits) ** 2)) / logits.std()
    assert 1e-4 < off < {"int8": 0.03, "int4": 0.4}[kind]


@pytest.mark.parametrize(
    ("kind", "compute"),
    [
        ("int8", Compute(scan_unroll=2)),
        ("int8", Compute(remat="dots")),
        ("int4", Compute(remat="full")),
        ("int8", Compute(attention="chunked", scan_unroll=1)),
    ],
    ids=["unrolled", "dots remat", "full remat", "chunked"],
)
def test_however_it_is_computed_it_is_the_same(kind: str, compute: Compute):
    params = coded_params(kind)
    assert_same(answers(params, compute=compute), answers(params))


@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_of_prompts(kind: str):
    params = coded_params(kind)
    assert_same(answers(params, prompts=2), answers(as_floats(params), prompts=2))


@pytest.mark.parametrize(
    ("kind", "shape", "over_data"),
    [("int8", (1, 2), False), ("int8", (2, 1), True), ("int4", (2, 2), True)],
)
def test_on_a_mesh_it_is_the_same(kind: str, shape: tuple[int, int], over_data: bool):
    params, mesh = coded_params(kind), sharding.make_mesh(*shape)
    shardings = sharding.tree_shardings(mesh, param_specs(CONFIG, kind), over_data)
    placed = jax.device_put(params, shardings)
    assert_same(answers(placed, compute=Compute(scan_unroll=1, mesh=mesh)), answers(params))


@pytest.mark.parametrize(
    ("kind", "search"),
    [("int8", Search(6)), ("int4", Search(6)), ("int8", Search(6, num_beams=3))],
    ids=["int8, greedy", "int4, greedy", "int8, beam"],
)
def test_cached_decoding(kind: str, search: Search):
    config = searches.make_config("t5-1.1")
    params = quantized(searches.make_params(config), config, kind)
    batch = searches.make_batch()
    found = searches.find(config, batch, search, params=params)
    wanted = searches.find(config, batch, search, params=as_floats(params))
    np.testing.assert_array_equal(found.ids_BT, wanted.ids_BT)
    np.testing.assert_allclose(found.score_B, wanted.score_B, rtol=1e-3, atol=1e-4)
    assert kind == "int4" or len(np.unique(found.ids_BT)) > 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision(dtype: str):
    params = coded_params("int8")
    exact, _ = answers(params)
    ours, grads = answers(params, compute=Compute(dtype, scan_unroll=1))
    assert np.sqrt(np.mean((ours - exact) ** 2)) / exact.std() < 0.05
    assert all(np.isfinite(grad).all() for grad in grads.values())


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_float_copy_of_the_stack_is_kept_for_the_backward_pass(kind: str, remat: str):
    """The loop over layers hands on codes, and makes floats of one layer's at a time, or none."""
    compute = Compute(scan_unroll=1, remat=remat)
    _, trained, frozen = parts(coded_params(kind), CONFIG, compute, 1)
    jaxpr = jax.make_jaxpr(program(CONFIG, compute, 1))(trained, frozen)
    stacks = {
        spec.shape for spec in trees.flatten(param_specs(CONFIG)).values()
        if isinstance(spec, ParamSpec) and spec.inputs and "layers" in spec.axes
    }  # fmt: skip
    made = [
        out.aval for equation, _ in equations(jaxpr.jaxpr) for out in equation.outvars
        if out.aval.shape in stacks and jnp.issubdtype(out.aval.dtype, jnp.floating)
    ]  # fmt: skip
    assert not made
    layers = {shape[1:] for shape in stacks}
    of_one = [
        equation for equation, _ in equations(jaxpr.jaxpr) for out in equation.outvars
        if out.aval.shape in layers and jnp.issubdtype(out.aval.dtype, jnp.floating)
    ]  # fmt: skip
    assert bool(of_one) == (kind == "int4")
