"""A config's `sweep:`: one file, many runs that differ in what the sweep names.

    sweep:
      seed: [0, 1, 2]
      optim.learning_rate: [0.1, 0.3]

is six runs. Every key of a run may be swept but those that all runs share.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt import schema
from jaxprompt.config import RunConfig, read_config, refuse_several, resolved
from jaxprompt.typing import UserError

_SHARED = ("output_dir", "tune", "backbone", "mesh", "logging", "sweep")
_SHARED_IN_TRAIN = ("eval_every", "save_every", "log_every", "keep", "accumulate", "at_once")


@dataclasses.dataclass(frozen=True)
class SweptRun:
    """One run of a sweep.

    Attributes:
      name: says its values; also its directory's name. Empty for a config without a sweep.
      values: what the sweep sets, by dotted key.
      config: the run, by itself.
    """

    name: str
    values: Mapping[str, Any]
    config: RunConfig


@dataclasses.dataclass(frozen=True)
class Sweep:
    """All runs of a config.

    Attributes:
      output_dir: of all of them.
      axes: dotted key -> the names of its values; empty without a sweep.
      runs: one for each combination of values, the last axis the fastest.
    """

    output_dir: str
    axes: Mapping[str, Sequence[str]]
    runs: Sequence[SweptRun]


def load_sweep(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Sweep:
    """Reads a config with or without a `sweep:`.

    Args: as `config.load_config`; `sweep.seed=[0,1]` sets an axis.
    Raises: UserError as `load_config`, for an axis that is no list, a value given twice, a key that
      all runs share, or an override of a key that is swept.
    """
    mapping, where = read_config(path_or_name, overrides)
    refuse_several(mapping, where)
    if "sweep" not in mapping:
        config = resolved(mapping, where, overrides, RunConfig)
        return Sweep(config.output_dir, {}, [SweptRun("", {}, config)])
    given = schema.plain(mapping.pop("sweep"))
    axes = _axes(given, where, ("sweep",)) if isinstance(given, Mapping) else {}
    if not axes:
        raise UserError(
            f"{where.at(('sweep',))}: sweep must hold `key: [value, ...]` lines, such as "
            "`seed: [0, 1, 2]`"
        )
    for override in overrides:
        key = override.partition("=")[0]
        if key in axes:
            raise UserError(f"override {override!r}: {key} is swept; set sweep.{key}=[...] instead")
    names = {key: _names([value for value, _ in values]) for key, values in axes.items()}
    runs = []
    for places in itertools.product(*(range(len(values)) for values in axes.values())):
        picked = dict(zip(axes, places, strict=True))
        settings = [(key, *axes[key][at]) for key, at in picked.items()]
        label = "_".join(f"{_short(key, axes)}-{names[key][at]}" for key, at in picked.items())
        config = resolved(mapping, where, overrides, RunConfig, settings)
        runs.append((label, {key: axes[key][at][0] for key, at in picked.items()}, config))
    output_dir = runs[0][2].output_dir
    return Sweep(
        output_dir,
        names,
        [
            SweptRun(name, values, dataclasses.replace(
                config, output_dir=str(Path(output_dir) / "prompts" / name)
            ))
            for name, values, config in runs
        ],
    )  # fmt: skip


def over_seeds(configs: Sequence[RunConfig], directory: Path) -> Sweep:
    """Runs that differ in nothing but the seed, with their results below `directory`."""
    runs = [
        SweptRun(f"seed-{one.seed}", {"seed": one.seed}, dataclasses.replace(
            one, output_dir=str(directory / "prompts" / f"seed-{one.seed}")
        ))
        for one in configs
    ]  # fmt: skip
    return Sweep(str(directory), {"seed": [str(one.seed) for one in configs]}, runs)


def read_seeds(given: Any, where: schema.Where, path: tuple[str, ...]) -> list[int]:
    """The seeds that a config's key at `path` lists.

    Raises: UserError for anything but different whole numbers.
    """
    place, key = where.at(path), ".".join(path)
    if not isinstance(given, list) or not given:
        raise UserError(f"{place}: {key} must be a list of numbers, such as [0, 1, 2]")
    seeds = [schema.plain(seed) for seed in given]
    wrong = [s for s in seeds if not isinstance(s, int) or isinstance(s, bool)]
    if wrong or len(set(seeds)) < len(seeds):
        what = f"{wrong[0]!r} is no whole number" if wrong else "one stands there twice"
        raise UserError(f"{place}: {key} must be different whole numbers; {what}")
    return seeds


def directory_word(name: str) -> str:
    """A name of a config's as the name of a directory."""
    return re.sub(r"[^\w.+-]+", "-", name).strip("-") or "unnamed"


def _axes(
    given: Mapping[str, Any], where: schema.Where, path: tuple[str, ...]
) -> dict[str, list[tuple[Any, str]]]:
    """Dotted key -> its values, each with the place where it was written."""
    axes: dict[str, list[tuple[Any, str]]] = {}
    for key, value in given.items():
        value, here = schema.plain(value), (*path, key)
        dotted = ".".join(here[1:])
        if isinstance(value, Mapping):
            axes |= _axes(value, where, here)
            continue
        place = where.at(here)
        if not isinstance(value, list) or not value:
            raise UserError(
                f"{place}: {'.'.join(here)} must be a list of values, such as [0, 1, 2]"
            )
        if any(value.count(one) > 1 for one in value):
            raise UserError(f"{place}: {'.'.join(here)} has a value twice")
        _check_own(dotted, place)
        axes[dotted] = [(one, where.at((*here, at))) for at, one in enumerate(value)]
    return axes


def _check_own(key: str, place: str) -> None:
    """Raises: UserError for a key that all runs of a sweep share."""
    section, _, name = key.partition(".")
    shared = section in _SHARED and key != "backbone.dropout"
    if shared or (section == "train" and name in _SHARED_IN_TRAIN):
        raise UserError(
            f"{place}: {key} is the same for all runs of a sweep, which share one backbone and one "
            "loop; give it outside of `sweep`, or start a run for each value"
        )


def _short(key: str, axes: Mapping[str, Any]) -> str:
    """The key's last word, or all of them where another key ends in the same one."""
    last = key.rpartition(".")[2]
    ends = Counter(other.rpartition(".")[2] for other in axes)
    return last if ends[last] == 1 else key.replace(".", "-")


def _names(values: Sequence[Any]) -> list[str]:
    """Values as parts of file names, all different."""
    words = []
    for value in values:
        if isinstance(value, Mapping):
            value = value.get("preset") or value.get("name") or ("value" if value else "")
        word = re.sub(r"[^\w.+-]+", "-", str(value)).strip("-")
        words.append(word or ("value" if value else "none"))
    counts = Counter(words)
    return [
        word if counts[word] == 1 else f"{word}-{number}" for number, word in enumerate(words, 1)
    ]
