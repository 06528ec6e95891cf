"""The same training step here and in PEFT, same weights, same rows, alternating in one run.

    python -m benchmarks.vs_peft --sizes small base --pairs 7
    python -m benchmarks.vs_peft --sizes small --prompts 8
    python -m benchmarks.vs_peft --sizes small --vocabulary DIR --data boolq=DIR rte=DIR

The first times a step on equal full rows, the second one step of N prompts here against N steps
there, the third examples of real lengths: packed here, padded to the longest of the batch there.

Needs torch and peft, which the project does not. On CPU both run float32 with all cores, and PEFT
bfloat16 in rows of its own; where torch sees a GPU both run there in bfloat16, PEFT eager and
compiled.
"""

import argparse
import dataclasses
import functools
import itertools
import os
import resource
import tempfile
from collections.abc import Callable, Sequence
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
from benchmarks.packing import Options, batches_of, task_of
from jaxprompt import allocator, steps, trees
from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.bank import PromptBank
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.model import T5
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
    torch_model: T5ForConditionalGeneration, config: T5Config, slots: int,
    batches: Sequence[Batch], device: str, compiled: bool,
) -> tuple[Stepper, np.ndarray]:  # fmt: skip
    """PEFT prompt tuning; returns what takes a step on each batch, and its first prompt [P, D]."""
    model, prompt = prompt_tuned(torch_model, config, slots, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    inputs = [_peft_inputs(batch, slots, device) for batch in batches]
    model.train()
    call = torch.compile(model) if compiled else model

    def step() -> float:
        for own in inputs:
            optimizer.zero_grad(set_to_none=True)
            loss = call(**own).loss
            loss.backward()
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return step, prompt


def _peft_inputs(batch: Batch, slots: int, device: str) -> dict[str, torch.Tensor]:
    """Rows without their slots, which PEFT puts there itself."""

    def there(array: np.ndarray) -> torch.Tensor:
        return torch.tensor(np.asarray(array), dtype=torch.long, device=device)

    weights = np.asarray(batch.loss_weights_BT)
    return {
        "input_ids": there(batch.encoder_ids_BS[:, slots:]),
        "attention_mask": there(batch.encoder_segments_BS[:, slots:] > 0),
        "labels": there(np.where(weights > 0, batch.targets_BT, -100)),
    }


def own_stepper(
    directory: Path, config: T5Config, compute: Compute, batches: Sequence[Batch],
    prompt_PD: np.ndarray, prompts: int = 1,
) -> Stepper:  # fmt: skip
    """This project's step over the weights in `directory`; with several prompts, of all at once."""
    params = load_params(directory, config, dtype=compute.dtype)
    optimizer = optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    if prompts > 1:
        method = PromptBank([SoftPrompt(prompt_PD + number) for number in range(prompts)])
        graphdef, trained, frozen = trees.split(PromptedT5(T5(config, params, compute), method))
        optimizers = [optimizer] * prompts
        state = steps.init_state(trained, optimizers, [0] * prompts)
        program = functools.partial(steps.train_step, graphdef, optimizers, steps.StepOptions())
        run, batches = jax.jit(program, donate_argnums=0), [_side_by_side(batches[0], prompts)]
    else:
        made = make_step(config, compute, batches[0], params, prompt_PD, optimizer)
        run, state, frozen = jax.jit(made.run, donate_argnums=0), made.state, made.frozen
    state, frozen, rows = jax.device_put((state, frozen, list(batches)))

    def step() -> float:
        nonlocal state
        for batch in rows:
            state, metrics = run(state, frozen, batch)
        jax.block_until_ready(state)
        return metrics["loss"][0].item()

    return step


def _side_by_side(batch: Batch, prompts: int) -> Batch:
    """The same rows for each of N prompts."""
    copies = [
        dataclasses.replace(batch, prompt_index_BG=np.full_like(batch.prompt_index_BG, number))
        for number in range(prompts)
    ]
    return jax.tree.map(lambda *parts: np.concatenate(parts), *copies)


@dataclasses.dataclass(frozen=True)
class Work:
    """What both sides do in a turn: the same examples, laid out as each side does it.

    Attributes:
      name: for the table.
      ours, theirs: batches; PEFT takes each of them `prompts` times.
      slots: P.
      prompts: trained at once here, one after another there.
      more: examples here for each one there, where they cannot be as many; ratios are of equal
        numbers.
    """

    name: str
    ours: Sequence[Batch]
    theirs: Sequence[Batch]
    slots: int
    prompts: int = 1
    more: float = 1.0


def compare(size: str, work: Work, pairs: int) -> list[list[str]]:
    """Rows of the table for one size: each PEFT variant against this project's step.

    On a CPU PEFT runs in float32, and in bfloat16, which some CPUs have instructions for.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if device == "cuda" else "float32"
    config = dataclasses.replace(size_config(size), dropout_rate=0.0)
    variants = [(False, dtype), (device == "cuda", "bfloat16")]
    rows = []
    for compiled, theirs_dtype in variants:
        torch_model = random_torch(config).to(getattr(torch, dtype))
        with tempfile.TemporaryDirectory() as directory:
            torch_model.save_pretrained(directory)
            theirs, prompt = peft_stepper(
                torch_model.to(getattr(torch, theirs_dtype)),
                config,
                work.slots,
                list(work.theirs) * work.prompts,
                device,
                compiled,
            )
            ours = own_stepper(
                Path(directory), config, Compute(dtype), work.ours, prompt, work.prompts
            )
        first = f"{ours():.4f} / {theirs():.4f}"
        own, peft = alternate(ours, theirs, pairs)
        name = f"{size}, PEFT {theirs_dtype} {'compiled' if compiled else 'eager'}, {work.name}"
        rows.append([name, str(own), str(peft), *ratios(own, peft, work.more), first])
    return rows


def full_rows(size: str, shapes: Shapes, prompts: int) -> Work:
    """One batch of full rows, for one prompt or several."""
    batch = random_batch(size_config(size), shapes)
    name = "full rows" if prompts == 1 else f"{prompts} prompts"
    return Work(name, [batch], [batch], shapes.slots, prompts)


def real_rows(
    place: str, vocabulary: str, split: str, slots: int, batch_size: int, batches: int
) -> Work:
    """The first examples of a task: packed here, padded to the longest there."""
    task, tokenizer = task_of(place), load_tokenizer(vocabulary)
    options = Options(split, batch_size, 512, slots)
    packed = batches_of("packed", task, tokenizer, options)
    longest = batches_of("longest", task, tokenizer, options)
    theirs = list(itertools.islice(longest, batches))
    wanted = sum(int((batch.example_index_BG >= 0).sum()) for batch in theirs)
    ours: list[Batch] = []
    while sum(int((batch.example_index_BG >= 0).sum()) for batch in ours) < wanted:
        ours.append(next(packed))
    count = sum(int((batch.example_index_BG >= 0).sum()) for batch in ours)
    name = f"{place.partition('=')[0]}: {count} examples packed, {wanted} padded"
    return Work(name, ours, theirs, slots, more=count / wanted)


def peak_gib() -> float:
    """Most memory this process ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["small"])
    for field in dataclasses.fields(Shapes):
        parser.add_argument(f"--{field.name}", type=int, default=field.default)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--prompts", type=int, default=1, help="trained at once")
    parser.add_argument("--data", nargs="+", default=[], metavar="TASK=DIR")
    parser.add_argument("--vocabulary", help="directory of a T5 tokenizer, for --data")
    parser.add_argument("--split", default="validation", help="of the tasks of --data")
    parser.add_argument("--batches", type=int, default=2, help="of each task, a turn")
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
    rows = []
    for size in args.sizes:
        works = [
            real_rows(place, args.vocabulary, args.split, shapes.slots, shapes.rows, args.batches)
            for place in args.data
        ] or [full_rows(size, shapes, args.prompts)]
        rows += [row for work in works for row in compare(size, work, args.pairs)]
    print(f"peak memory of the process, both sides: {peak_gib():.2f} GiB\n")
    head = [
        "backbone", "jaxprompt", "PEFT", "PEFT / jaxprompt: medians", "middle half of pairs",
        "best", "processor time", "first loss",
    ]  # fmt: skip
    print(table(head, rows))


if __name__ == "__main__":
    main()
