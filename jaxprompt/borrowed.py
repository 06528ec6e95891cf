"""What a run takes from elsewhere: first values, sources, a teacher, a text to be pulled towards.

`trainee`, `training` and `pruning` ask for it; other prompts have to be of the run's backbone.
"""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprompt.artifact import check_backbone, load_artifact
from jaxprompt.backbone import Backbone
from jaxprompt.config import RunConfig
from jaxprompt.data.tasks import Task
from jaxprompt.prompts import METHODS, slots_of
from jaxprompt.prompts.init import InitContext
from jaxprompt.prompts.similarity import average_tokens
from jaxprompt.typing import UserError


def initial_values(config: RunConfig, backbone: Backbone, *tasks: Task) -> dict[str, np.ndarray]:
    """First values of the method's parameters, float32, drawn from `config.seed`.

    Args:
      tasks: the run's.
    Raises: UserError for an `init` that is not possible, or a prompt to begin from that does not
      fit or is of another backbone.
    """
    candidates = [word for task in tasks for word in task.candidates or task.config.init_words]
    context = InitContext(
        sizes=backbone.config,
        vocab_size=backbone.tokenizer.size,
        rows=backbone.embedding_rows,
        encode=backbone.tokenizer.encode,
        candidates=tuple(dict.fromkeys(candidates)),
        load=_rows_of,
        source=functools.partial(_source_rows, backbone),
        artifact=lambda path: _parts_of(path, backbone),
    )
    key = jax.random.key(config.seed)
    return METHODS[config.method.name].initial(key, config.method, context)


def text_rows(config: RunConfig, backbone: Backbone) -> np.ndarray | None:
    """Embeddings of `regularize.wayward_text`, repeated to the prompt's slots, float32 [P, D].

    Returns: None without a text.
    Raises: UserError if it has no tokens, or more than the prompt has slots.
    """
    text, slots = config.regularize.wayward_text, slots_of(config.method)
    if not text:
        return None
    ids = backbone.tokenizer.encode(text)
    if not 0 < len(ids) <= slots:
        raise UserError(
            f"regularize.wayward_text {text!r} has {len(ids)} tokens, the prompt {slots} slots: "
            "each slot is pulled towards a token, so there have to be some and not more than slots"
        )
    return backbone.embedding_rows([ids[n % len(ids)] for n in range(slots)])


def teacher(config: RunConfig, backbone: Backbone) -> tuple[np.ndarray, float]:
    """Rows of the teachers, float32 [T, P, D], and the similarity of the only one to the task.

    T is 1, or one of each task in their order. The similarity is above 0; 1 if it is not to be
    measured.

    Raises: UserError for a teacher that has other slots than the run, or is not similar at all, and
      for teachers of other tasks than the run's.
    """
    distil, slots = config.distil, slots_of(config.method)
    names = list(config.task.mixture) or [config.task.name]
    if distil.teachers and set(distil.teachers) != set(names):
        raise UserError(
            f"distil.teachers has a prompt of {', '.join(sorted(distil.teachers))}, the tasks of "
            f"the run are {', '.join(names)}: name one of each"
        )
    rows = []
    for path in [distil.teachers[name] for name in names] if distil.teachers else [distil.prompt]:
        rows.append(_source_rows(backbone, path))
        if len(rows[-1]) != slots:
            raise UserError(
                f"teacher {path} has {len(rows[-1])} slots, the run's method {config.method.name} "
                f"{slots}: they have to stand in the same ones"
            )
    if not distil.target:
        return np.stack(rows), 1.0
    similarity = average_tokens(rows[0], _source_rows(backbone, distil.target))
    if similarity <= 0:
        raise UserError(
            f"distil.prompt {distil.prompt} has similarity {similarity:.3f} to distil.target "
            f"{distil.target}: it has nothing to teach; choose another (`jaxprompt transfer`)"
        )
    return np.stack(rows), similarity


def digests(paths: Sequence[str]) -> dict[str, str]:
    """What the rows of prompts are, by path."""
    return {path: hashlib.sha256(_rows_of(path).tobytes()).hexdigest()[:16] for path in paths}


def _rows_of(path: str) -> np.ndarray:
    artifact = load_artifact(path)
    if "prompt" not in artifact.values:
        raise UserError(
            f"prompt {path} is of method {artifact.method['name']} and has no rows to begin from"
        )
    return artifact.values["prompt"]


def _parts_of(path: str, backbone: Backbone) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    artifact = load_artifact(path)
    check_backbone(artifact, backbone.name, backbone.fingerprint, backbone.config.d_model)
    return artifact.method, artifact.values


def _source_rows(backbone: Backbone, path: str) -> np.ndarray:
    """Rows of a soft prompt of this backbone, float32 [P', D]; UserError for any other."""
    artifact = load_artifact(path)
    if artifact.method["name"] != "soft":
        raise UserError(
            f"prompt {path} is of method {artifact.method['name']}; a source is a soft prompt"
        )
    check_backbone(artifact, backbone.name, backbone.fingerprint, backbone.config.d_model)
    return artifact.values["prompt"].astype(np.float32)
