"""A config's `compare:`: prompt methods, each with options of its own, and the seeds of all.

    compare:
      seeds: [0, 1, 2]
      methods:
        soft: {method: {length: 20}, optim: {learning_rate: 0.1}}
        residual: {optim: {recipe: residual}}

The rest of the config is what they share. Every method is a sweep over the seeds.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt import schema
from jaxprompt.config import RunConfig, read_config, resolved
from jaxprompt.prompts import METHODS
from jaxprompt.sweep_config import Sweep, directory_word, over_seeds, read_seeds
from jaxprompt.typing import UserError

# What makes scores and speeds comparable; the rest a method may have of its own.
_SHARED = ("output_dir", "task", "seed", "tune", "backbone", "mesh", "logging", "compare")
_FORM = "`compare: {seeds: [0, 1, 2], methods: {soft: {}, residual: {method.length: 10}}}`"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Prompt methods to compare on one task and backbone.

    Attributes:
      output_dir: of all of it.
      sweeps: of each method, by the name that the config gives it: its runs, one a seed.
    """

    output_dir: str
    sweeps: Mapping[str, Sweep]

    @property
    def shared(self) -> RunConfig:
        """A run, for what all of them share."""
        return next(iter(self.sweeps.values())).runs[0].config


def load_comparison(
    path_or_name: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Comparison:
    """Reads a config with a `compare:`.

    Args:
      path_or_name, overrides: as `config.load_config`; `compare.seeds=[0,1]` changes the seeds.
      only: names of the methods to take; none = all.
    Raises: UserError as `load_config`, for a config without a proper `compare:`, an option that all
      methods share, or a name in `only` that is not there.
    """
    mapping, where = read_config(path_or_name, overrides)
    given = schema.plain(mapping.pop("compare", None))
    place = where.at(("compare",))
    if not isinstance(given, Mapping):
        raise UserError(f"{place}: there is nothing to compare; a config for it has {_FORM}")
    if set(given) != {"seeds", "methods"}:
        raise UserError(
            f"{place}: compare has `seeds` and `methods` and nothing else, as in {_FORM}; "
            f"got {', '.join(map(str, given)) or 'neither'}"
        )
    for other in ("sweep", "scale"):
        if other in mapping:
            raise UserError(f"{where.at((other,))}: a config has either `compare` or `{other}`")
    seeds = read_seeds(schema.plain(given["seeds"]), where, ("compare", "seeds"))
    methods = schema.plain(given["methods"])
    place = where.at(("compare", "methods"))
    if not isinstance(methods, Mapping) or not methods:
        raise UserError(f"{place}: compare.methods must be a mapping of names, as in {_FORM}")
    names = [str(name) for name in methods]
    unknown = [name for name in only if name not in names]
    if unknown:
        raise UserError(
            f"--only {unknown[0]!r} is not one of the methods to compare: {', '.join(names)}"
        )
    sweeps, output_dir = {}, ""
    for name, options in methods.items():
        if only and str(name) not in only:
            continue
        settings = _settings(str(name), schema.plain(options), where)
        configs = [
            resolved(mapping, where, overrides, RunConfig, [*settings, ("seed", seed, place)])
            for seed in seeds
        ]
        output_dir = configs[0].output_dir
        directory = Path(output_dir) / "methods" / directory_word(str(name))
        sweeps[str(name)] = over_seeds(configs, directory)
    if any(sweep.runs[0].config.task.mixture for sweep in sweeps.values()):
        raise UserError(
            f"{where.at(('task',))}: methods are compared on one task, and task.mixture has several"
        )
    if len({sweep.output_dir for sweep in sweeps.values()}) < len(sweeps):
        raise UserError(f"{place}: two methods have names that give the same directory; rename one")
    return Comparison(output_dir, sweeps)


def _settings(name: str, options: Any, where: schema.Where) -> list[tuple[str, Any, str]]:
    """A method's options as (dotted key, value, place); its name says which it is unless given."""
    path = ("compare", "methods", name)
    if options is None:
        options = {}
    if not isinstance(options, Mapping):
        raise UserError(
            f"{where.at(path)}: compare.methods.{name} must be a mapping of a run's options, such "
            "as {method: {length: 10}, optim: {learning_rate: 0.1}}"
        )
    settings = [
        (key, value, where.at((*path, *tail))) for key, value, tail in schema.leaves(options)
    ]
    for key, _, place in settings:
        section = key.partition(".")[0]
        if section in _SHARED:
            raise UserError(
                f"{place}: {section} is the same for all that are compared; give it outside of "
                "`compare`"
            )
    if all(key != "method.name" for key, _, _ in settings):
        word = name.split()[0] if name.split() else name
        if word not in METHODS:
            raise UserError(
                f"{where.at(path)}: {name!r} begins with the name of no method; give it "
                f"`method.name`, one of {', '.join(METHODS)}"
            )
        settings.insert(0, ("method.name", word, where.at(path)))
    return settings
