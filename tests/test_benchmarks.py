"""The analytic minimum of a step against the matmuls of the traced programs, counted one by one."""

import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
import tiny
from tiny_backbone import make_rows, write_rows
from tiny_tokenizer import tiny_tokenizer

from benchmarks import bank, generate, packing, pages, pretrain
from benchmarks.common import SIZES, Shapes, make_step, random_batch, size_config
from jaxprompt import steps, trees
from jaxprompt.config import PretrainConfig
from jaxprompt.data.pretraining import MixtureConfig
from jaxprompt.data.sources import SourceConfig
from jaxprompt.data.tasks import Task, TaskConfig
from jaxprompt.model import PromptedT5
from jaxprompt.planning.flops import forward_flops, matmul_flops, minimal_step_flops, step_terms
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.t5.model import T5

SHAPES = Shapes(rows=2, tokens=6, slots=3, targets=4)
CONFIGS = {
    "gated": tiny.CONFIG,
    "plain": dataclasses.replace(tiny.CONFIG, gated=False, activation="relu"),
    "tied": dataclasses.replace(tiny.CONFIG, tie_word_embeddings=True),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
ROOM = (SHAPES.rows, SHAPES.encoder, SHAPES.targets)


@every_config
def test_forward_terms_are_the_forward_matmuls(config: T5Config):
    graphdef, _, frozen = trees.split(PromptedT5(T5(config, abstract_params(config))))
    batch = random_batch(config, SHAPES)
    program = jax.make_jaxpr(functools.partial(steps.logits, graphdef, {}))(frozen, batch)
    assert matmul_flops(program) == forward_flops(config, *ROOM)


@every_config
def test_the_step_has_the_minimums_matmuls(config: T5Config):
    """And the gradient of the decoder before it meets the prompt, which the compiler removes."""
    step = make_step(config, Compute(), random_batch(config, SHAPES), optimizer=optax.sgd(0.1))
    program = jax.make_jaxpr(step.run)(step.state, step.frozen, step.batch)
    layers = config.num_decoder_layers
    before_the_prompt = sum(
        term.backward // (layers - 1)
        for term in step_terms(config, *ROOM)
        if term.name.startswith("decoder self") or term.name == "cross-attention query"
    )
    before_the_prompt += (
        2 * SHAPES.rows * SHAPES.targets * SHAPES.encoder * config.num_heads * config.d_kv
    )
    assert matmul_flops(program) == minimal_step_flops(config, *ROOM) + before_the_prompt


def test_pretraining_has_three_times_the_forward_matmuls():
    """Forward, the gradients of activations and those of weights."""
    config = PretrainConfig("x", MixtureConfig(), model=tiny.CONFIG, tokenizer="y")
    step = pretrain.programs(config, random_batch(tiny.CONFIG, Shapes(2, 9, 0, 4)))["step"]
    assert pretrain.step_flops(step) == 3 * forward_flops(tiny.CONFIG, 2, 9, 4)


def test_the_compiled_step_is_near_the_minimum():
    """Sizes large enough that norms and softmax count for little; compiled, not run."""
    config = dataclasses.replace(
        tiny.CONFIG, d_model=256, d_kv=32, d_ff=512, vocab_size=1000, num_layers=2
    )
    shapes = Shapes(rows=2, tokens=48, slots=16, targets=4)
    step = make_step(config, Compute(), random_batch(config, shapes))
    compiled = jax.jit(step.run).lower(step.state, step.frozen, step.batch).compile()
    minimum = minimal_step_flops(config, shapes.rows, shapes.encoder, shapes.targets)
    assert 1 <= compiled.cost_analysis()["flops"] / minimum < 1.05


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_t5_1_1(size: str):
    config = size_config(size)
    millions = {"small": 77, "base": 248, "large": 783, "xl": 2850, "xxl": 11135}
    assert round(trees.count(abstract_params(config)) / 1e6) == millions[size]


def test_a_bank_generates_what_its_prompts_generate_one_by_one(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(generate, "SEARCHES", {"greedy": {}})
    (row,) = generate.together(tiny.CONFIG, SHAPES, prompts=3, pairs=1, rest=0)
    assert len(row) == len(generate.head("one", "other"))
    assert "tokens/s" in row[1] and row[-1] == "6 of 6"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_peft_generates_the_same_in_the_benchmark(monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("torch").set_num_threads(1)
    pytest.importorskip("peft")
    monkeypatch.setattr(generate, "SEARCHES", {"greedy": {}})
    (row,) = generate.against_peft(tiny.CONFIG, SHAPES, pairs=1, rest=0)
    assert row[-1] == "2 of 2"


def test_ways_of_padding_count_the_same_text(tmp_path):
    """The same rows however they are padded: fewer positions in the order of the ways."""
    write_rows(tmp_path / "train.jsonl", make_rows(64))
    source = SourceConfig(train=str(tmp_path / "train.jsonl"))
    task = Task(TaskConfig(source=source, candidates=("0", "1", "2")))
    options = packing.Options("train", batch_size=8, max_tokens=60, slots=3)
    costs = {}
    for way in packing.WAYS:
        stream = packing.batches_of(way, task, tiny_tokenizer(), options)
        batches = [next(stream) for _ in range(8)]
        costs[way] = packing.counted(tiny.CONFIG, batches)
        if way in ("fixed", "longest"):
            assert {len(batch.encoder_ids_BS) for batch in batches} == {8}
    assert costs["fixed"].positions == 63
    assert costs["longest"].positions < 63
    assert costs["packed"].fill > max(costs[way].fill for way in ("fixed", "longest"))
    assert costs["fixed"].gflop == pytest.approx(
        minimal_step_flops(tiny.CONFIG, 8, 63, 2) / 8e9, rel=0.3
    )


def test_a_bank_s_step_is_the_steps_of_its_prompts():
    shapes = Shapes(rows=2, tokens=6, slots=3, targets=4)
    params = tiny.make_params(tiny.CONFIG, 1)
    together = bank.make_bank(tiny.CONFIG, params, shapes, 3)
    alone = bank.make_bank(tiny.CONFIG, params, shapes, 1)
    together.step()
    alone.step()
    assert together.loss is not None and together.loss.shape == (3,)
    np.testing.assert_allclose(together.loss[0], alone.loss[0], rtol=1e-5)  # pyright: ignore
    assert len(set(together.loss.tolist())) == 3


def test_the_rows_of_the_page_benchmark_are_read():
    assert pages.parse("mini:32x96+20") == ("mini", Shapes(rows=32, tokens=96, slots=20))
    with pytest.raises(ValueError, match="ROWSxTOKENS"):
        pages.parse("small:8x128")
