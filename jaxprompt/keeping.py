"""What a run keeps of its prompts: artifacts, one for each task, of what methods fold to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxprompt
from jaxprompt.artifact import PromptArtifact, save_artifact
from jaxprompt.backbone import Backbone, identity_of
from jaxprompt.config import RunConfig
from jaxprompt.prompts import METHODS
from jaxprompt.prompts.base import MethodConfig, Values
from jaxprompt.schema import to_mapping
from jaxprompt.t5.weights import save_hf
from jaxprompt.trainee import Trainee
from jaxprompt.trees import merge
from jaxprompt.typing import ArrayTree


def keep(
    one: Trainee,
    backbone: Backbone,
    name: str,
    number: int,
    trained: ArrayTree,
    first: Mapping[str, np.ndarray],
    metrics: Mapping[str, float],
    rest: tuple[Any, ArrayTree],
) -> None:
    """Writes what was trained to its directory: an artifact, or a backbone with `tune: model`.

    Args:
      name: of the artifact's directory.
      number: steps taken.
      trained: its trained tree.
      first: the first values of its method, of which some may be constant.
      rest: graph definition and frozen tree, for a backbone.
    """
    place, config = one.directory / name, one.config
    if config.tune == "model":
        graphdef, frozen = rest
        tree = merge(graphdef, trained, frozen).backbone.tree()
        save_hf(place, tree, backbone.config, tokenizer_dir=backbone.directory)
        return
    provenance: dict[str, Any] = {
        "recipe": config.optim.recipe, "steps": number, "seed": config.seed,
        "metrics": dict(metrics), "jaxprompt": jaxprompt.__version__,
    }  # fmt: skip
    if backbone.quantize != "none":
        provenance["quantize"] = backbone.quantize
    if config.task.mixture:
        provenance["mixture"] = list(config.task.mixture)
    values = {**first, **jax.device_get(trained["method"])}
    save_artifact(place, artifact_of(config, backbone, values, provenance))
    for part, own in zip(one.parts, each_task(config, values), strict=True):
        if part.name:
            told = {**provenance, "metrics": _metrics_of_part(part.name, metrics)}
            kept = artifact_of(part.config, backbone, own, told)
            save_artifact(Path(part.config.output_dir) / name, kept)


def prompts_of_tasks(one: Trainee, values: Mapping[str, Any]) -> list[tuple[MethodConfig, Values]]:
    """What the artifacts of each of its tasks hold: options and arrays on the host."""
    found = []
    for part, own in zip(one.parts, each_task(one.config, values), strict=True):
        method, made = plain_prompt(part.config, own)
        found.append((method, {name: np.asarray(value) for name, value in made.items()}))
    return found


def each_task(config: RunConfig, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A method's values for each task of a run: of parts for each its own, the others as they are.

    With `part_config` these are a method that was trained on that task alone.
    """
    parts = METHODS[config.method.name].task_parts
    return [
        {name: value[n : n + 1] if name in parts else value for name, value in values.items()}
        for n in range(max(1, len(config.task.mixture)))
    ]


def plain_prompt(config: RunConfig, values: Mapping[str, Any]) -> tuple[MethodConfig, Values]:
    """What the artifact of a run on one task holds: a plain prompt where the method folds."""
    info = METHODS[config.method.name]
    if info.fold is None:
        return config.method, values
    plain = info.fold({name: jnp.asarray(value) for name, value in values.items()}, config.method)
    return plain.config, plain.values


def artifact_of(
    config: RunConfig, backbone: Backbone, values: Mapping[str, Any], provenance: Mapping[str, Any]
) -> PromptArtifact:
    """The artifact of all of a method's values; of a plain prompt, where the method folds to one.

    What the method was is then told in its provenance. Parts for each of several tasks do not
    fold; what belongs to several tasks names none.
    """
    info, method = METHODS[config.method.name], config.method
    if info.fold is not None and not (config.task.mixture and info.task_parts):
        provenance = {**provenance, "method": to_mapping(method)}
        method, values = plain_prompt(config, values)
    return PromptArtifact(
        method=to_mapping(method),
        layout=config.layout,
        task={} if config.task.mixture else to_mapping(config.task),
        backbone=identity_of(backbone),
        values={name: np.asarray(value) for name, value in values.items()},
        lengths={
            "max_input_length": config.data.max_input_length,
            "max_target_length": config.data.max_target_length,
        },
        training=provenance,
    )


def _metrics_of_part(name: str, metrics: Mapping[str, float]) -> dict[str, float]:
    mark = f"{name}/"
    return {key.removeprefix(mark): value for key, value in metrics.items() if key.startswith(mark)}
