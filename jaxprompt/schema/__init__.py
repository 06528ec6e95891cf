"""Typed options out of YAML: read with line numbers, checked against dataclasses, written back.

Called by `config` for a run's options and by any room that reads a typed mapping of its own.
"""

from jaxprompt.schema.text import (
    KeyPath,
    Where,
    apply_overrides,
    configs_directory,
    describe,
    leaves,
    overlay,
    plain,
    read_extended,
    read_yaml,
    set_values,
    write_yaml,
)
from jaxprompt.schema.typed import dump, from_mapping, to_mapping, variants

__all__ = [
    "KeyPath",
    "Where",
    "apply_overrides",
    "configs_directory",
    "describe",
    "dump",
    "from_mapping",
    "leaves",
    "overlay",
    "plain",
    "read_extended",
    "read_yaml",
    "set_values",
    "to_mapping",
    "variants",
    "write_yaml",
]
