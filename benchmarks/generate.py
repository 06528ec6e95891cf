"""Tokens a second of generation: against PEFT in torch, and prompts together against one by one.

    python -m benchmarks.generate --size small --new 32

Every answer has exactly `--new` tokens on both sides, since neither knows an end token. Float32 on
CPU with all cores, bfloat16 where torch sees a GPU. `--only bank` needs neither torch nor peft.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share one GPU

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.common import (
    SIZES,
    Shapes,
    Timed,
    alternate,
    machine,
    random_batch,
    ratios,
    size_config,
    spread,
    table,
)
from jaxprompt import steps, trees
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import PromptMethod
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import init_params
from jaxprompt.t5.model import T5
from jaxprompt.t5.search import Search
from jaxprompt.t5.weights import load_params
from jaxprompt.typing import ArrayTree, Batch

SEARCHES = {"greedy": {}, "beam 4": {"num_beams": 4}}
MIB = 2**20

Generating = Callable[[], np.ndarray]  # generates to the end and returns ids, int32 [B, T]


def without_end(config: T5Config) -> T5Config:
    """The architecture with no token that ends an answer."""
    return dataclasses.replace(config, eos_id=-1, dropout_rate=0.0)


def with_beginning(batch: Batch, config: T5Config) -> Batch:
    """The batch with nothing but the start token on its decoder side."""
    ids = np.full((len(batch.decoder_ids_BT), 1), config.decoder_start_id, np.int32)
    return dataclasses.replace(
        batch,
        decoder_ids_BT=ids,
        decoder_slots_BT=np.full_like(ids, -1),
        decoder_segments_BT=np.ones_like(ids),
        targets_BT=np.zeros_like(ids),
        loss_weights_BT=np.zeros(ids.shape, np.float32),
    )


class Own:
    """This project's generation with one method, compiled for one batch and search."""

    def __init__(self, backbone: T5, method: PromptMethod, batch: Batch, search: Search):
        graphdef, trained, self._frozen = trees.split(PromptedT5(backbone, method))
        self._rules = search.rules
        self._run = (
            jax.jit(steps.generate, static_argnums=0)
            .lower(graphdef, trained, self._frozen, batch, rules=self._rules)
            .compile()
        )

    def __call__(self, trained: ArrayTree, batch: Batch) -> jax.Array:
        """Ids of a batch with a prompt's values, not waited for."""
        return self._run(trained, self._frozen, batch, rules=self._rules).ids_BT

    @property
    def temporaries(self) -> str:
        """What the compiler sets aside beside weights and rows, in MiB."""
        return f"{self._run.memory_analysis().temp_size_in_bytes / MIB:.1f}"


def own_generating(
    backbone: T5, prompt_PD: np.ndarray, batch: Batch, search: Search
) -> tuple[Generating, str]:
    """Generation with one prompt, and its temporaries."""
    method = SoftPrompt(jnp.asarray(prompt_PD))
    own = Own(backbone, method, batch, search)
    _, trained, _ = trees.split(PromptedT5(backbone, method))
    rows = jax.device_put(batch)
    return lambda: np.asarray(own(trained, rows)), own.temporaries


def peft_generating(model: Any, slots: int, batch: Batch, options: dict, new: int) -> Generating:
    """The same rows through PEFT's and torch's `generate`."""
    import torch

    ids = torch.tensor(batch.encoder_ids_BS[:, slots:], dtype=torch.long, device=model.device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def generate() -> np.ndarray:
        with torch.no_grad():
            said = model.generate(**inputs, do_sample=False, max_new_tokens=new, **options)
        return said[:, 1:].cpu().numpy()

    return generate


def against_peft(
    config: T5Config, shapes: Shapes, pairs: int, rest: float = 0.3
) -> list[list[str]]:
    """Rows of the table: greedy and a beam, here and in PEFT, in turns."""
    import torch

    from benchmarks.vs_peft import prompt_tuned, random_torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compute = Compute("bfloat16" if device == "cuda" else "float32")
    config = without_end(config)
    batch = with_beginning(random_batch(config, shapes), config)
    torch_model = random_torch(dataclasses.replace(config, eos_id=1))
    torch_model = torch_model.to(getattr(torch, compute.dtype)).eval()
    torch_model.generation_config.eos_token_id = None
    with tempfile.TemporaryDirectory() as directory:
        torch_model.save_pretrained(directory)
        params = load_params(Path(directory), config, dtype=compute.dtype)
    model, prompt_PD = prompt_tuned(torch_model, config, shapes.slots, device)
    backbone = T5(config, params, compute)
    rows = []
    for name, options in SEARCHES.items():
        search = Search(shapes.targets, **options)
        ours, temporaries = own_generating(backbone, prompt_PD, batch, search)
        theirs = peft_generating(model, shapes.slots, batch, options, shapes.targets)
        mine, other = ours(), theirs()
        if mine.shape != other.shape:
            raise ValueError(f"{name}: ids {mine.shape} here and {other.shape} in PEFT")
        equal = f"{(mine == other).all(1).sum()} of {len(mine)}"
        own, peft = alternate(ours, theirs, pairs, rest)
        rows.append([name, *_speeds(mine.size, own, peft), *ratios(own, peft), temporaries, equal])
    return rows


def together(
    config: T5Config, shapes: Shapes, prompts: int, pairs: int, rest: float = 0.3
) -> list[list[str]]:
    """Rows of the table: a batch of rows for many prompts, and the same rows prompt by prompt.

    Args:
      shapes: its rows are those of one prompt.
    """
    config = without_end(config)
    backbone = T5(config, init_params(config, jax.random.key(0)), Compute())
    draw = np.random.default_rng(1)
    size = (prompts, shapes.slots, config.d_model)
    methods = [SoftPrompt(jnp.asarray(values)) for values in draw.normal(size=size).astype("f4")]
    everything = dataclasses.replace(shapes, rows=prompts * shapes.rows)
    batch = with_beginning(random_batch(config, everything), config)
    numbers = np.repeat(np.arange(prompts, dtype=np.int32), shapes.rows)[:, None]
    mixed = jax.device_put(dataclasses.replace(batch, prompt_index_BG=numbers))
    each = [
        jax.device_put(jax.tree.map(lambda x: x[at : at + shapes.rows], batch))  # noqa: B023
        for at in range(0, everything.rows, shapes.rows)
    ]
    alone_trained = [trees.split(PromptedT5(backbone, method))[1] for method in methods]
    bank = PromptBank(methods)
    bank_trained = trees.split(PromptedT5(backbone, bank))[1]
    rows = []
    for name, options in SEARCHES.items():
        search = Search(shapes.targets, **options)
        one, many = Own(backbone, methods[0], each[0], search), Own(backbone, bank, mixed, search)

        def banked(many: Own = many) -> np.ndarray:
            return np.asarray(many(bank_trained, mixed))

        def one_by_one(one: Own = one) -> np.ndarray:
            said = [one(*pair) for pair in zip(alone_trained, each, strict=True)]
            return np.concatenate([np.asarray(ids) for ids in said])

        said = banked()
        equal = f"{(said == one_by_one()).all(1).sum()} of {len(said)}"
        own, other = alternate(banked, one_by_one, pairs, rest)
        memory = f"{many.temporaries} / {one.temporaries}"
        rows.append([name, *_speeds(said.size, own, other), *ratios(own, other), memory, equal])
    return rows


def _speeds(tokens: int, *sides: Timed) -> list[str]:
    return [
        f"{tokens / statistics.median(side.wall):.1f} tokens/s, {spread(side.wall)}"
        for side in sides
    ]


def head(one: str, other: str) -> Sequence[str]:
    """Columns of a table."""
    return [
        "search", one, other, f"{other} / {one}: medians", "middle half of pairs", "best",
        "processor time", "temporaries MiB", "same answers",
    ]  # fmt: skip


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", choices=[*SIZES, "mini"], default="small")
    parser.add_argument("--only", choices=("peft", "bank"))
    parser.add_argument("--rows", type=int, default=8, help="against PEFT")
    parser.add_argument("--prompts", type=int, default=16, help="together and one by one")
    parser.add_argument("--rows-each", type=int, default=1, help="of a prompt in the batch of all")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--slots", type=int, default=100)
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer")
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    config = size_config(args.size)
    shapes = Shapes(args.rows, args.tokens, args.slots, args.new)
    print(machine())
    print(
        f"T5 1.1 {args.size}, random weights, rows of {args.slots} slots and {args.tokens} tokens, "
        f"{args.new} new tokens, {args.pairs} pairs"
    )
    if args.only != "bank":
        import torch
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        torch.set_num_threads(len(os.sched_getaffinity(0)))
        print(f"\n{args.rows} rows; torch {torch.__version__}, {torch.get_num_threads()} threads\n")
        print(table(head("jaxprompt", "PEFT"), against_peft(config, shapes, args.pairs)))
    if args.only != "peft":
        shapes = dataclasses.replace(shapes, rows=args.rows_each)
        print(f"\n{args.prompts} prompts, {args.rows_each} rows each\n")
        rows = together(config, shapes, args.prompts, args.pairs)
        print(table(head("one batch", "one by one"), rows))


if __name__ == "__main__":
    main()
