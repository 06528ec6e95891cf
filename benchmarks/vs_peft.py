"""The same training step here and in PEFT, same weights, same rows, alternating in one run.

    python -m benchmarks.vs_peft --sizes small base --pairs 7

Needs torch and peft, which the project does not. On CPU both run float32 with all cores; where
torch sees a GPU both run there in bfloat16, PEFT eager and compiled.
"""

import argparse
import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # two frameworks share one GPU

import jax
import numpy as np
import optax
import torch
from peft import PeftModel, PromptTuningConfig, TaskType, get_peft_model
from transformers import T5Config as HFConfig
from transformers import T5ForConditionalGeneration
from transformers.utils import logging as transformers_logging

from benchmarks.common import (
    Shapes,
    alternate,
    machine,
    make_step,
    random_batch,
    ratios,
    size_config,
    table,
)
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.weights import load_params
from jaxprompt.typing import Batch

LEARNING_RATE, WEIGHT_DECAY = 1e-3, 1e-2

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


def prompt_tuned(
    torch_model: T5ForConditionalGeneration, config: T5Config, slots: int, device: str
) -> tuple[PeftModel, np.ndarray]:
    """The model with PEFT's prompt before its encoder input, and that prompt, float32 [P, D]."""
    peft_config = PromptTuningConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        num_virtual_tokens=slots,
        num_transformer_submodules=1,
        token_dim=config.d_model,
        num_layers=config.num_layers,
        num_attention_heads=config.num_heads,
    )
    model = get_peft_model(torch_model, peft_config).to(device)
    (trained,) = (parameter for parameter in model.parameters() if parameter.requires_grad)
    return model, trained.detach().float().cpu().numpy().copy()


def peft_stepper(
    torch_model: T5ForConditionalGeneration, config: T5Config, shapes: Shapes, batch: Batch,
    device: str, compiled: bool,
) -> tuple[Stepper, np.ndarray]:  # fmt: skip
    """PEFT prompt tuning; returns the step and its first prompt, float32 [P, D]."""
    model, prompt = prompt_tuned(torch_model, config, shapes.slots, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
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


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["small"])
    for field in dataclasses.fields(Shapes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--pairs", type=int, default=7)
    args = parser.parse_args()
    shapes = Shapes(args.rows, args.tokens, args.slots, args.targets)
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    print(f"{machine()} · torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(
        f"{shapes.rows} rows x ({shapes.slots} slots + {shapes.tokens} tokens), {shapes.targets} "
        f"targets; prompt tuning with AdamW, random T5 1.1, {args.pairs} pairs\n"
    )
    rows = [row for size in args.sizes for row in compare(size, shapes, args.pairs)]
    head = [
        "backbone", "jaxprompt", "PEFT", "PEFT / jaxprompt: medians", "middle half of pairs",
        "best", "processor time", "first loss",
    ]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
