"""The same training step here and in PEFT, same weights, same rows, alternating in one run.

    python -m benchmarks.vs_peft --sizes small base --pairs 7

Needs torch and peft, which the project does not. On CPU both run float32 with all cores; where
torch sees a GPU both run there in bfloat16, PEFT eager and compiled.
"""

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share one GPU

import jax
import numpy as np
import optax
import torch
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import T5Config as HFConfig
from transformers import T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from benchmarks.common import Shapes, machine, make_step, random_batch, size_config, spread, table
from jaxprompt import allocator
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.weights import load_params
from jaxprompt.typing import Batch

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2
REST = 0.3  # seconds between two timed steps, so that one's worker threads stop spinning first

Stepper = Callable[[], float]  # takes a step to its end and returns its loss


def random_torch(config: T5Config) -> T5ForConditionalGeneration:
    """A random T5 1.1 of transformers, its output layer scaled to a first loss near ln V."""
    torch.manual_seed(0)
    hf_config = HFConfig(**config.to_hf())
    hf_config.tie_word_embeddings = False  # transformers 5 makes it True whatever it is told
    model = T5ForConditionalGeneration(hf_config)
    model.set_input_embeddings(model.shared)  # and without it gives each stack a table of its own
    model.lm_head.weight.data *= config.d_model**-0.5
    return model


def peft_stepper(
    torch_model: T5ForConditionalGeneration, config: T5Config, shapes: Shapes, batch: Batch,
    device: str, compiled: bool,
) -> tuple[Stepper, np.ndarray]:  # fmt: skip
    """PEFT prompt tuning; returns the step and its first prompt, float32 [P, D]."""
    peft_config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=shapes.slots,
        num_transformer_submodules=1,
        token_dim=config.d_model,
        num_layers=config.num_layers,
        num_attention_heads=config.num_heads,
    )
    model = get_peft_model(torch_model, peft_config).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prompt = trained[0].detach().float().cpu().numpy().copy()
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    ids = torch.tensor(batch.encoder_ids_BS[:, shapes.slots :], dtype=torch.long, device=device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": torch.tensor(batch.targets_BT, dtype=torch.long, device=device),
    }
    model.train()
    call = torch.compile(model) if compiled else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = call(**inputs).loss
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return step, prompt


def own_stepper(
    directory: Path, config: T5Config, compute: Compute, batch: Batch, prompt_PD: np.ndarray
) -> Stepper:
    """This project's step over the weights in `directory`."""
    params = load_params(directory, config, dtype=compute.dtype)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    made = make_step(config, compute, batch, params, prompt_PD, optimizer)
    run = jax.jit(made.run, donate_argnums=0)
    state, frozen, rows = jax.device_put((made.state, made.frozen, made.batch))

    def step() -> float:
        nonlocal state
        state, metrics = run(state, frozen, rows)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return step


@dataclasses.dataclass(frozen=True)
class Timed:
    """Every timed step of one side, in seconds: on the clock, and of all threads together."""

    wall: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return f"{spread(self.wall)}, processor {statistics.median(self.processor):.2f} s"


def alternate(ours: Stepper, theirs: Stepper, pairs: int) -> tuple[Timed, Timed]:
    """Both in turns after a warm-up of both; who goes first flips every pair."""
    own, peft = Timed(), Timed()
    for pair in range(-1, pairs):
        turns = [(ours, own), (theirs, peft)]
        for step, timed in turns if pair % 2 else turns[::-1]:
            time.sleep(REST)
            wall, processor = time.perf_counter(), time.process_time()
            step()
            if pair >= 0:
                timed.wall.append(time.perf_counter() - wall)
                timed.processor.append(time.process_time() - processor)
    return own, peft


def compare(size: str, shapes: Shapes, pairs: int) -> list[list[str]]:
    """Rows of the table for one size: each PEFT variant against this project's step."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    config = dataclasses.replace(size_config(size), dropout_rate=0.0)
    batch = random_batch(config, shapes)
    rows = []
    for compiled in [False, True] if device == "cuda" else [False]:
        torch_model = random_torch(config).to(getattr(torch, dtype))
        with tempfile.TemporaryDirectory() as directory:
            torch_model.save_pretrained(directory)
            theirs, prompt = peft_stepper(torch_model, config, shapes, batch, device, compiled)
            ours = own_stepper(Path(directory), config, Compute(dtype), batch, prompt)
        first = f"{ours():.4f} / {theirs():.4f}"
        own, peft = alternate(ours, theirs, pairs)
        name = f"{size} {dtype} {'compiled' if compiled else 'eager'}"
        rows.append([name, str(own), str(peft), *ratios(own, peft), first])
    return rows


def ratios(own: Timed, peft: Timed) -> list[str]:
    """PEFT over this project: medians, the middle half of the pairs, best times, processor time."""
    pairs = sorted(b / a for a, b in zip(own.wall, peft.wall, strict=True))
    processor = statistics.median(peft.processor) / statistics.median(own.processor)
    return [
        f"{statistics.median(peft.wall) / statistics.median(own.wall):.2f}",
        f"{pairs[len(pairs) // 4]:.2f} - {pairs[-1 - len(pairs) // 4]:.2f}",
        f"{min(peft.wall) / min(own.wall):.2f}",
        f"{processor:.2f}",
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["small"])
    for field in dataclasses.fields(Shapes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument(
        "--keep-pages", action="store_true", help="as commands do on CPU, in both frameworks"
    )
    args = parser.parse_args()
    kept = args.keep_pages and allocator.keep_pages()  # before either has threads
    shapes = Shapes(args.rows, args.tokens, args.slots, args.targets)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{machine()} · torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{shapes.rows} rows x ({shapes.slots} slots + {shapes.tokens} tokens), {shapes.targets} "
        f"targets; prompt tuning with AdamW, random T5 1.1, {args.pairs} pairs, "
        f"freed pages {'kept' if kept else 'given back'}\n"
    )
    rows = [row for size in args.sizes for row in compare(size, shapes, args.pairs)]
    head = [
        "backbone", "jaxprompt", "PEFT", "PEFT / jaxprompt: medians", "middle half of pairs",
        "best", "processor time", "first loss",
    ]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
