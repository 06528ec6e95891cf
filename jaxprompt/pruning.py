"""XPrompt between its two trainings: what slots and their pieces are worth, and which stay.

`training` trains the soft prompt in `tuned/` of a run's directory, asks here for what is left of
it, which stays on disk, and trains that as the run itself.
"""

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxprompt.artifact import load_artifact
from jaxprompt.backbone import Backbone
from jaxprompt.borrowed import initial_values
from jaxprompt.config import RunConfig
from jaxprompt.data.tasks import Task
from jaxprompt.files import write_file
from jaxprompt.hosts import from_first, is_first
from jaxprompt.identity import check_identity
from jaxprompt.losses import cross_entropy, token_weights
from jaxprompt.model import PromptedT5
from jaxprompt.prompts import MethodConfig
from jaxprompt.prompts.xprompt import (
    EachExamplesPrompt,
    XPromptConfig,
    most_important,
    piece_mask,
    pruned,
)
from jaxprompt.sharding import data_share, replicate, shard_batch, to_host
from jaxprompt.tensorfile import read_safetensors, safetensors_bytes
from jaxprompt.trainee import make_trainee, run_identity, train_batches
from jaxprompt.trees import merge, split
from jaxprompt.typing import Array, ArrayTree, Batch, UserError

TUNED = "tuned"  # the first training's directory, in the run's
_FILE = "pruned.safetensors"


def is_pruned(config: RunConfig) -> bool:
    """Whether a run trains twice."""
    return config.tune == "prompt" and isinstance(config.method, XPromptConfig)


def check(configs: Sequence[RunConfig], backbone: Backbone) -> None:
    """Finds before the first training what would stop the second.

    Raises: UserError for a layout that counts slots, pieces that do not divide embeddings, several
      tasks, a pull towards a text, a teacher, or other methods beside XPrompt.
    """
    if others := {config.method.name for config in configs if not is_pruned(config)}:
        raise UserError(
            f"method xprompt trains twice and shares no bank with {', '.join(sorted(others))}; run "
            "them one by one"
        )
    for config in configs:
        assert isinstance(config.method, XPromptConfig)
        config.method.check_divides(backbone.config.d_model)
        if config.task.mixture:
            raise UserError(
                "method xprompt prunes a prompt by what one task needs of it; give a task without "
                "task.mixture"
            )
        if config.regularize.wayward:
            raise UserError(
                "regularize.wayward pulls each slot towards a token of its own, and method xprompt "
                "takes slots out between them; set it to 0 or prune no prompt"
            )
        if config.distil.is_on:
            raise UserError(
                "distil compares with a teacher in the same slots, and method xprompt takes slots "
                "out; prune no prompt, or have none taught"
            )
        if config.layout.count("{prompt}") != 1 or "{prompt:" in config.layout:
            raise UserError(
                f"method xprompt takes slots out wherever they stand, so the layout "
                f"{config.layout!r} cannot count them; write one {{prompt}} without a count"
            )


def unpruned(config: RunConfig) -> RunConfig:
    """The run of the soft prompt that will be pruned."""
    names = [field.name for field in dataclasses.fields(MethodConfig) if field.name != "name"]
    method = MethodConfig(**{name: getattr(config.method, name) for name in names})
    place = str(Path(config.output_dir) / TUNED)
    return dataclasses.replace(config, method=method, output_dir=place)


def read_pruned(config: RunConfig, backbone: Backbone) -> dict[str, np.ndarray] | None:
    """What was left of a run's soft prompt; None if it was not pruned yet.

    Raises: UserError if that was another run.
    """
    path = _path(config)

    def read() -> tuple[Any, list[np.ndarray]]:
        if not path.exists():
            return None, []
        found = {name: np.array(tensor.read()) for name, tensor in read_safetensors(path).items()}
        return json.loads(found["run"].tobytes()), [found["kept"], found["mask"]]

    identity, arrays = from_first(read)
    if identity is None:
        return None
    check_identity(identity, run_identity(config, backbone), config.output_dir)
    return dict(zip(("kept", "mask"), arrays, strict=True))


def prune(config: RunConfig, backbone: Backbone, mesh: Mesh) -> dict[str, np.ndarray]:
    """What stays of the soft prompt that `unpruned` trained; written to that run's directory.

    Slots are scored with all of them there, pieces with the slots that stay.

    Returns: first values of the method.
    """
    method, whole = config.method, unpruned(config)
    assert isinstance(method, XPromptConfig)
    best = Path(whole.output_dir) / "best"
    _, (rows_PD,) = from_first(lambda: (None, [load_artifact(best).values["prompt"]]))
    scores_P, _ = importance(whole, backbone, mesh, rows_PD, method)
    slots = most_important(scores_P, method.tokens_kept)
    _, scores_PK = importance(config, backbone, mesh, rows_PD[slots], method)
    mask_PK = piece_mask(scores_PK, method.pieces_kept)
    if method.rewind == "first":
        rows_PD = initial_values(whole, backbone, Task(config.task))["prompt"]
    values = pruned(rows_PD[slots], mask_PK)
    if is_first():
        run = json.dumps(run_identity(config, backbone)).encode("utf-8")
        kept = {"run": np.frombuffer(run, np.uint8), "slots": np.array(slots, np.int32)}
        scores = {"slot_scores": scores_P, "piece_scores": scores_PK}
        write_file(_path(config), safetensors_bytes({**kept, **scores, **values}))
        print(
            f"{config.output_dir}: {len(slots)} of {method.length} slots stay "
            f"({', '.join(map(str, slots))}), of their pieces {int(mask_PK.sum())} of "
            f"{mask_PK.size}",
            file=sys.stderr,
        )
    return values


def importance(
    config: RunConfig,
    backbone: Backbone,
    mesh: Mesh,
    rows_PD: np.ndarray,
    method: XPromptConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """E|dL/dgamma_i| of each slot, E|dL/dzeta_ij| of each piece, over training examples.

    Args:
      config: whose slots `rows_PD` stand in.
      method: says how many pieces, and of how many examples.
    Returns: float32 [P] and [P, k].
    Source: Ma et al. 2022, arXiv 2210.04457.
    """
    devices = mesh.shape["data"]
    rows = -(-config.data.batch_size // devices) * devices
    one = make_trainee("", dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, packing=False, batch_size=rows),
        train=dataclasses.replace(config.train, accumulate=1),
    ), backbone)  # fmt: skip
    prompts = {"prompts": jnp.zeros((1, *rows_PD.shape))}
    model = PromptedT5(backbone.module(), EachExamplesPrompt(prompts, config.method))
    graphdef, _, frozen = split(model)
    rows_PD = replicate(mesh, rows_PD)
    total, count = None, max(1, min(method.scored, len(one.source)) // rows)
    with closing(train_batches(one, devices, data_share(mesh))) as batches:
        for batch in itertools.islice(batches, count):
            sums = to_host(_sums(
                graphdef, method.pieces, rows_PD, frozen, shard_batch(mesh, batch, own=True)
            ))  # fmt: skip
            total = sums if total is None else jax.tree.map(np.add, total, sums)
    slots_P, pieces_PK, examples = jax.tree.map(np.asarray, total)
    return slots_P / examples, pieces_PK / examples


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sums(
    graphdef: Any, pieces: int, rows_PD: Array, frozen: ArrayTree, batch: Batch
) -> tuple[Array, Array, Array]:
    """Importance summed over the examples of a batch, one a row, and how many these are."""
    size = rows_PD.shape[1] // pieces

    def loss(masks_BPK: Array) -> Array:
        prompts_BPD = rows_PD[None] * jnp.repeat(masks_BPK, size, axis=-1)
        logits_BTV = merge(graphdef, {"method": {"prompts": prompts_BPD}}, frozen)(batch)
        weights_BT, _ = token_weights(
            batch.loss_weights_BT, batch.decoder_segments_BT, 1, "examples"
        )
        return jnp.sum(cross_entropy(logits_BTV, batch.targets_BT) * weights_BT)

    slopes_BPK = jax.grad(loss)(jnp.ones((len(batch.targets_BT), len(rows_PD), pieces)))
    # what multiplies a slot multiplies all of its pieces
    slots_P = jnp.sum(jnp.abs(jnp.sum(slopes_BPK, axis=-1)), axis=0)
    examples = jnp.sum(batch.example_index_BG >= 0, dtype=jnp.float32)
    return slots_P, jnp.sum(jnp.abs(slopes_BPK), axis=0), examples


def _path(config: RunConfig) -> Path:
    return Path(config.output_dir) / TUNED / _FILE
