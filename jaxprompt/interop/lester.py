"""Prompts that google-research/prompt-tuning trained: its numpy files, or a whole T5X checkpoint.

Called by `importing`.
"""

import dataclasses
import os
from pathlib import Path

import numpy as np

from jaxprompt.arraystore import is_remote
from jaxprompt.artifact import PromptArtifact, load_artifact, soft_prompt
from jaxprompt.t5.t5x import newest_step, open_t5x
from jaxprompt.typing import UserError

_ARRAYS = "numpy_checkpoints"
_PROMPT = "encoder/prompt/prompt/prompt"  # the prompt's name in T5X's tree
_VARIABLES = ("encoder.", "decoder.")
_FILE = _PROMPT.replace("/", ".")  # and that of its numpy twin, which has no suffix


def read_lester(source: str) -> PromptArtifact | None:
    """The soft prompt of a run; None if `source` is nothing of the kind.

    Args:
      source: a run's directory (its newest step counts), its `numpy_checkpoints`, one step of
        either, a T5X checkpoint that holds a prompt (also `gs://`), or one numpy file.
    Raises: UserError for a prompt of another kind, or a damaged one.
    """
    place = Path(source)
    if not is_remote(source) and place.is_file():
        if place.name != _FILE and place.name.startswith(_VARIABLES):
            raise _no_soft_prompt(place.parent, [place.name])
        return load_artifact(place)
    step = source if is_remote(source) else _step_directory(place)
    if step is None:
        return None
    if (Path(step) / _FILE).is_file():
        prompt = load_artifact(Path(step) / _FILE)
    else:
        prompt = _from_checkpoint(os.fspath(step))
    if prompt is None:
        return None
    return dataclasses.replace(prompt, training={"from": "google-research/prompt-tuning"})


def _step_directory(place: Path) -> Path | None:
    """The directory of one step that `place` means."""
    if not place.is_dir():
        return None
    if (place / _ARRAYS).is_dir():
        place = place / _ARRAYS
    return newest_step(place) or place


def _from_checkpoint(location: str) -> PromptArtifact | None:
    checkpoint = open_t5x(location)
    if checkpoint is None:
        others = [name for name in _names(location) if name.startswith(_VARIABLES)]
        if others:
            raise _no_soft_prompt(location, others)
        return None
    if _PROMPT not in checkpoint.prompts:
        others = ", ".join(list(checkpoint.prompts)[:3]) or "no prompt at all"
        raise UserError(f"{checkpoint.where}: holds {others}, not {_PROMPT}")
    array = np.array(checkpoint.prompts[_PROMPT].read())
    return soft_prompt(array, f"{_PROMPT} of {checkpoint.where}", location)


def _no_soft_prompt(where: Path | str, names: list[str]) -> UserError:
    return UserError(f"{where} holds {', '.join(names[:3])}, which is no soft prompt ({_FILE})")


def _names(location: str) -> list[str]:
    return sorted(os.listdir(location)) if os.path.isdir(location) else []
