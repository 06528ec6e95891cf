"""A config's `phases:`: pretraining runs one after another, some from the weights of earlier ones.

    phases:
      span: {train: {steps: 10000}}
      lm: {after: span, mixture: {...}, train: {steps: 1000}}

The rest of the config is what they share; the directory of each is `output_dir/NAME`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt import schema
from jaxprompt.config import PretrainConfig, load_config, read_config, refuse_several, resolved
from jaxprompt.typing import UserError

_FORM = "`phases: {span: {}, lm: {after: span, train: {steps: 1000}}}`"


def load_phases(
    path_or_name: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> dict[str, PretrainConfig]:
    """Reads a pretraining config, with or without a `phases:`.

    Args:
      path_or_name, overrides: as `config.load_config`; `phases.lm.train.steps=10` changes a phase.
        What a phase gives itself stands above an override of what all share.
      only: names of the phases to take; none = all.
    Returns: the runs by name, in their order; a config without phases is one run, named "".
    Raises: UserError as `load_config`, for a `phases:` of another form, a phase after one that does
      not come before it, or a name in `only` that is not there.
    """
    mapping, where = read_config(path_or_name, overrides)
    refuse_several(mapping, where)
    given = schema.plain(mapping.pop("phases", None))
    if given is None:
        if only:
            raise UserError(f"--only {only[0]!r}: {path_or_name} has no phases")
        return {"": load_config(path_or_name, overrides, PretrainConfig)}
    if not isinstance(given, Mapping) or not given:
        raise UserError(f"{where.at(('phases',))}: must be a mapping of names, as in {_FORM}")
    unknown = [name for name in only if name not in given]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is not one of the phases: {', '.join(given)}")
    phases: dict[str, PretrainConfig] = {}
    for name, options in given.items():
        phases[name] = _phase(name, schema.plain(options), phases, (mapping, where), overrides)
    return {name: config for name, config in phases.items() if not only or name in only}


def _phase(
    name: str,
    options: Any,
    earlier: Mapping[str, PretrainConfig],
    shared: tuple[dict[str, Any], schema.Where],
    overrides: Sequence[str],
) -> PretrainConfig:
    """One run; after another phase it has that one's backbone in place of a new one."""
    mapping, where = shared
    path = ("phases", name)
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise UserError(f"{where.at(path)}: {name!r} is to be the name of a directory")
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise UserError(
            f"{where.at(path)}: phases.{name} must be a mapping of a run's options, as in {_FORM}"
        )
    if "output_dir" in options:
        raise UserError(
            f"{where.at((*path, 'output_dir'))}: a phase's directory is output_dir/{name}; give "
            "output_dir outside of `phases`"
        )
    after = schema.plain(options.get("after"))
    if after is not None and after not in earlier:
        raise UserError(
            f"{where.at((*path, 'after'))}: phases.{name} is to come after {after!r}; the phases "
            f"before it are {', '.join(earlier) or 'none'}"
        )
    settings = [
        (key, value, where.at((*path, *tail)))
        for key, value, tail in schema.leaves(options)
        if key != "after"
    ]
    if after is not None:
        place = where.at((*path, "after"))
        start = str(Path(earlier[after].output_dir) / "backbone")
        weights = {"model": None, "tokenizer": "", "backbone.name": start}
        settings += [(key, value, place) for key, value in weights.items()]
    config = resolved(mapping, where, overrides, PretrainConfig, settings)
    return dataclasses.replace(config, output_dir=str(Path(config.output_dir) / name))
