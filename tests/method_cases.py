"""Every prompt method with small options, started and shaken so that nothing of it is zero."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tiny

from jaxprompt import schema, trees
from jaxprompt.prompts import METHODS, MethodConfig, MethodInputs, PromptMethod
from jaxprompt.prompts.init import InitContext
from jaxprompt.t5.config import T5Config
from jaxprompt.typing import Batch, PromptValues

PARAMS = tiny.make_params()
TASKS = ["first", "second", "third"]
CASES: dict[str, dict[str, Any]] = {
    "soft": {"length": 4},
    "p-tuning": {"length": 4, "hidden": 6},
    "p-tuning lstm": {"length": 4, "hidden": 5, "encoder": "lstm"},
    "residual": {"length": 4, "hidden": 6},
    "residual per token": {"length": 4, "hidden": 6, "per_token": True},
    "residual plain": {"length": 4, "hidden": 6, "layer_norm": False},
    "p-tuning-v2": {"length": 3},
    "p-tuning-v2 encoder": {"length": 3, "places": ["encoder"]},
    "prefix": {"length": 3, "hidden": 6},
    "prefix cross": {"length": 3, "hidden": 6, "places": ["cross", "decoder"]},
    "dpt": {"length": 4, "rank": 2},
    "lopt": {"length": 4, "rank": 2},
    "lopt product": {"length": 4, "rank": 2, "variant": 1},
    "superpos": {"length": 4, "tokens": 8},
    "dept": {"length": 4, "rank": 2, "positions": 4},
    "adept": {"length": 4, "rank": 3},
    "smop": {"length": 3, "prompts": 3},
    "pt-moe": {"length": 4, "rank": 2, "experts": 3},
    "attempt": {"length": 4, "hidden": 6, "temperature": 1.5, "sources": ["one", "other"]},
    "xprompt": {"length": 6, "pieces": 4},
    "per-layer": {"length": 3},
    "per-layer add": {"length": 3, "mode": "add"},
    "multitask": {"length": 4, "tasks": TASKS},
    "multitask concat": {"length": 3, "tasks": TASKS, "combine": "concat", "task_length": 2},
    "multitask features": {"length": 4, "tasks": TASKS, "combine": "concat-features"},
    "multitask project": {
        "length": 4, "tasks": TASKS, "combine": "project", "shared_features": 5,
    },
    "mpt": {"length": 4, "tasks": TASKS, "rank": 2},
}  # fmt: skip


def config_of(case: str, **options: Any) -> MethodConfig:
    """The case's options; its first word is the method."""
    mapping = {"name": case.split()[0], "init": "vocab", **CASES[case], **options}
    return schema.from_mapping(MethodConfig, mapping, case)


def context_of(sizes: T5Config = tiny.CONFIG) -> InitContext:
    """What a method begins from over the tiny backbone."""
    table = np.asarray(tiny.make_params(sizes)["token_embedder"]["embedding"])
    return InitContext(
        sizes=sizes,
        vocab_size=sizes.vocab_size,
        rows=lambda ids: table[np.asarray(ids)],
        encode=lambda text: [3, 4],
        candidates=("yes", "no"),
        source=lambda path: np.random.default_rng(len(path)).normal(size=(4, sizes.d_model)),
    )


def shaken(config: MethodConfig, seed: int = 0, sizes: T5Config = tiny.CONFIG) -> dict[str, Any]:
    """First values and some noise on all that is trained."""
    info = METHODS[config.name]
    values = info.initial(jax.random.key(seed), config, context_of(sizes))
    constant = info.make({k: jnp.asarray(v) for k, v in values.items()}, config).constants
    draw = np.random.default_rng(seed)
    return {
        name: jnp.asarray(
            value if name in constant else value + 0.3 * draw.normal(size=value.shape), jnp.float32
        )
        for name, value in values.items()
    }


def make(case: str, seed: int = 0, **options: Any) -> PromptMethod:
    """The method of a case with shaken values."""
    config = config_of(case, **options)
    return METHODS[config.name].make(shaken(config, seed), config)


def examples_of(case: str, count: int, seed: int = 0, prompt: int = 0) -> list[tiny.Example]:
    """Examples with the slots that the case's method has."""
    config = config_of(case)
    examples = tiny.make_examples(count, METHODS[config.name].slots(config), seed=seed)
    tasks = len(getattr(config, "tasks", ())) or 1
    return [
        dataclasses.replace(example, prompt=prompt, task=(n + 1) % tasks)
        for n, example in enumerate(examples)
    ]


def inputs_of(batch: Batch, keys: jax.Array | None = None) -> MethodInputs:
    embeds = jnp.asarray(PARAMS["token_embedder"]["embedding"])[batch.encoder_ids_BS]
    return MethodInputs(
        embeds, batch.encoder_slots_BS, batch.encoder_segments_BS, batch.prompt_index_BG, keys,
        batch.task_index_BG,
    )  # fmt: skip


def values_of(method: PromptMethod, inputs: MethodInputs) -> PromptValues:
    graphdef, trained, constants = trees.split(method)
    fields = {field.name: getattr(inputs, field.name) for field in dataclasses.fields(inputs)}
    run = jax.jit(lambda *parts, fields: trees.merge(graphdef, *parts)(MethodInputs(**fields)))
    return run(trained, constants, fields=fields)


def packed(case: str, prompt: int = 0) -> Batch:
    examples = examples_of(case, 5, prompt=prompt)
    return tiny.make_batch([examples[:3], examples[3:]], 32, 12, 3)
