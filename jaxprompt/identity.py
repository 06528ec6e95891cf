"""What a run is: backbone, task, method ..., kept with its checkpoints and compared on resuming."""

import json
from collections.abc import Mapping
from typing import Any

from jaxprompt.typing import UserError

_LONGEST = 80  # characters of a value in one message


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any], directory: object) -> None:
    """Refuses to resume a run as another one.

    Args:
      saved: what the run in the directory is: backbone, task, method ..., JSON data.
      current: the same of this run.
      directory: the run's directory, for the message.
    Raises: UserError naming every entry that differs, both values.
    """
    before, now = _entries(saved), _entries(json.loads(json.dumps(current)))
    differing = [
        f"{key} {_shown(before, key)}, now {_shown(now, key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        raise UserError(
            f"run directory {directory} was trained with {'; with '.join(differing)}: set them "
            "back or choose another output_dir"
        )


def _shown(entries: Mapping[str, Any], key: str) -> str:
    text = str(entries.get(key, "not set"))
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _entries(tree: Any, prefix: str = "") -> dict[str, Any]:
    """JSON data -> {"a.b": value}; lists are values."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    entries: dict[str, Any] = {}
    for key, value in tree.items():
        entries |= _entries(value, f"{prefix}.{key}" if prefix else str(key))
    return entries
