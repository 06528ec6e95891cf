"""What the measurements share: sizes by name, random rows, the training step, turns, machine."""

import dataclasses
import datetime
import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxprompt import steps, trees
from jaxprompt.measuring import processor
from jaxprompt.model import PromptedT5
from jaxprompt.prompts.soft import SoftPrompt
from jaxprompt.t5.backbones import MINI, planned_config
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.layers import abstract_params
from jaxprompt.t5.model import T5
from jaxprompt.typing import ArrayTree, Batch

SIZES = ("small", "base", "large", "xl", "xxl")  # of T5 1.1
REST = 0.3  # seconds between two timed runs, so that one's worker threads stop spinning first


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Of one step: rows B, text tokens a row, prompt slots P before them, target tokens T."""

    rows: int = 8
    tokens: int = 128
    slots: int = 100
    targets: int = 8

    @property
    def encoder(self) -> int:
        """S, positions of the encoder."""
        return self.tokens + self.slots


@dataclasses.dataclass(frozen=True)
class Step:
    """A training step and what it is called with: `jax.jit(run)(state, frozen, batch)`."""

    run: Any
    state: steps.TrainState
    frozen: ArrayTree
    batch: Batch


def size_config(name: str) -> T5Config:
    """The architecture called `name`: a T5 1.1 size, or "mini", the packaged backbone."""
    if name == "mini":
        return planned_config(MINI)
    return planned_config(f"google/t5-v1_1-{name}")


def random_batch(config: T5Config, shapes: Shapes, seed: int = 0) -> Batch:
    """Full rows without padding, slots first, one segment a row; numpy."""
    draw = np.random.default_rng(seed)
    rows, slots = shapes.rows, shapes.slots
    encoder_ids = draw.integers(3, config.vocab_size, (rows, shapes.encoder), dtype=np.int32)
    encoder_slots = np.full((rows, shapes.encoder), -1, np.int32)
    encoder_slots[:, :slots] = np.arange(slots)
    encoder_ids[:, :slots] = config.pad_id
    targets = draw.integers(3, config.vocab_size, (rows, shapes.targets), dtype=np.int32)
    decoder_ids = np.concatenate(
        [np.full((rows, 1), config.decoder_start_id, np.int32), targets[:, :-1]], 1
    )
    return Batch(
        encoder_ids_BS=encoder_ids,
        encoder_slots_BS=encoder_slots,
        encoder_segments_BS=np.ones_like(encoder_ids),
        decoder_ids_BT=decoder_ids,
        decoder_slots_BT=np.full_like(decoder_ids, -1),
        decoder_segments_BT=np.ones_like(decoder_ids),
        targets_BT=targets,
        loss_weights_BT=np.ones(targets.shape, np.float32),
        prompt_index_BG=np.zeros((rows, 1), np.int32),
        example_index_BG=np.arange(rows, dtype=np.int32)[:, None],
    )


def make_step(
    config: T5Config,
    compute: Compute,
    batch: Batch,
    params: ArrayTree | None = None,
    prompt_PD: np.ndarray | None = None,
    optimizer: optax.GradientTransformation | None = None,
    quantize: str = "none",
) -> Step:
    """The training step of a soft prompt over a frozen backbone.

    Args:
      params, prompt_PD: None = abstract, enough to compile and for machines too small to run it.
      optimizer: default AdamW.
      quantize: of abstract parameters.
    """
    optimizer = optimizer or optax.adamw(0.3)
    if params is None:
        params = abstract_params(config, compute.dtype, quantize)
    if prompt_PD is None:
        prompt = jax.ShapeDtypeStruct(
            (int(np.max(batch.encoder_slots_BS)) + 1, config.d_model), jnp.float32
        )
    else:
        prompt = jnp.asarray(prompt_PD)
    model = PromptedT5(T5(config, params, compute), SoftPrompt(prompt))
    graphdef, trained, frozen = trees.split(model)
    init = functools.partial(steps.init_state, optimizers=[optimizer], seeds=[0])
    state = jax.eval_shape(init, trained) if prompt_PD is None else init(trained)
    run = functools.partial(steps.train_step, graphdef, [optimizer], steps.StepOptions())
    return Step(run, state, frozen, batch)


@dataclasses.dataclass(frozen=True)
class Timed:
    """Every timed run of one side, in seconds: on the clock, and of all threads together."""

    wall: list[float] = dataclasses.field(default_factory=list)
    processor: list[float] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        return f"{spread(self.wall)}, processor {statistics.median(self.processor):.2f} s"


def alternate(
    one: Callable[[], Any], other: Callable[[], Any], pairs: int, rest: float = REST
) -> tuple[Timed, Timed]:
    """Both in turns after a warm-up of both; who goes first flips every pair."""
    first, second = Timed(), Timed()
    for pair in range(-1, pairs):
        turns = [(one, first), (other, second)]
        for run, timed in turns if pair % 2 else turns[::-1]:
            time.sleep(rest)
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if pair >= 0:
                timed.wall.append(time.perf_counter() - wall)
                timed.processor.append(time.process_time() - processor)
    return first, second


def ratios(one: Timed, other: Timed, more: float = 1.0) -> list[str]:
    """The other over the one: medians, the middle half of the pairs, best times, processor time.

    Args:
      more: work the one does for each of the other's.
    """
    pairs = sorted(more * b / a for a, b in zip(one.wall, other.wall, strict=True))
    processor = more * statistics.median(other.processor) / statistics.median(one.processor)
    return [
        f"{more * statistics.median(other.wall) / statistics.median(one.wall):.2f}",
        f"{pairs[len(pairs) // 4]:.2f} - {pairs[-1 - len(pairs) // 4]:.2f}",
        f"{more * min(other.wall) / min(one.wall):.2f}",
        f"{processor:.2f}",
    ]


def machine() -> str:
    """One line: date, processor, cores, load, device and versions."""
    device = jax.devices()[0]
    now = datetime.datetime.now(datetime.UTC)
    return (
        f"{now:%Y-%m-%d %H:%M} UTC · {processor()} · {os.cpu_count()} cores · "
        f"load {os.getloadavg()[0]:.1f} · {device.platform} ({device.device_kind}) · "
        f"Python {platform.python_version()} · jax {jax.__version__}"
    )


def peak_bytes() -> int:
    """Most memory this process ever held.

    Not `getrusage`, which begins with what the process that started this one held.
    """
    status = Path("/proc/self/status").read_text(encoding="ascii")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(peak.split()[1])


def spread(seconds: Sequence[float]) -> str:
    """Median and range: "1.234 s (1.200 - 1.401)"."""
    return f"{statistics.median(seconds):.3f} s ({min(seconds):.3f} - {max(seconds):.3f})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
