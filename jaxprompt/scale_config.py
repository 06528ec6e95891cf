"""A config's `scale:`: lines of a picture over backbones of several sizes, on several tasks.

    scale:
      seeds: [0, 1, 2]
      backbones: {1 M: runs/ladder/1m/lm/backbone, 4 M: runs/ladder/4m/lm/backbone}
      tasks: {sst2: {source.data_dir: data/sst2}}
      lines:
        prompt tuning: {}
        model tuning: {tune: model, optim: {recipe: model-tuning}}
        prompt design: {shots: 4}

The rest of the config is what they share. A line over one backbone on one task is a cell: a sweep
over the seeds, or with `shots` as many draws of examples that the bare backbone is shown.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt import schema
from jaxprompt.config import RunConfig, read_config, resolved
from jaxprompt.data.tasks import TaskConfig
from jaxprompt.sweep_config import Sweep, directory_word, over_seeds, read_seeds
from jaxprompt.typing import UserError

_NEEDED = ("seeds", "backbones", "tasks", "lines")
_KEYS = (*_NEEDED, "zero_shot", "pictures")
_FORM = (
    "`scale: {seeds: [0, 1, 2], backbones: {small: DIR, large: DIR}, tasks: {sst2: {}}, lines: "
    "{prompt tuning: {}}}`"
)
# What makes the lines comparable, or belongs to the cell.
_SHARED = ("output_dir", "task", "seed", "mesh", "logging", "scale")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One line's place over one backbone on one task.

    Attributes:
      task, line, backbone: as the config calls them.
      sweep: its runs, one a seed; `sweep.output_dir` is the cell's directory.
      shots: examples shown to the bare backbone in place of training; None = the runs are trained.
    """

    task: str
    line: str
    backbone: str
    sweep: Sweep
    shots: int | None

    @property
    def config(self) -> RunConfig:
        """A run, for what its seeds share."""
        return self.sweep.runs[0].config

    @property
    def seeds(self) -> list[int]:
        return [run.config.seed for run in self.sweep.runs]


@dataclasses.dataclass(frozen=True)
class Scale:
    """Cells, task by task, line by line, from the first backbone to the last.

    Attributes:
      output_dir: of all of it.
      zero_shot: of a task, others that what was trained on it is measured on too.
      pictures: lines of each, by its name; empty = all are in one.
    """

    output_dir: str
    cells: Sequence[Cell]
    zero_shot: Mapping[str, Mapping[str, TaskConfig]]
    pictures: Mapping[str, Sequence[str]]


def load_scale(
    path_or_name: str | Path, overrides: Sequence[str] = (), only: Sequence[str] = ()
) -> Scale:
    """Reads a config with a `scale:`.

    Args:
      path_or_name, overrides: as `config.load_config`; `scale.seeds=[0,1]` changes the seeds.
      only: names of the lines to take; none = all.
    Raises: UserError as `load_config`, for a config without a proper `scale:`, an option that all
      cells share, or a name in `only` that is not there.
    """
    mapping, where = read_config(path_or_name, overrides)
    given = schema.plain(mapping.pop("scale", None))
    place = where.at(("scale",))
    if not isinstance(given, Mapping):
        raise UserError(f"{place}: there are no sizes to go over; a config for it has {_FORM}")
    unknown = [key for key in given if key not in _KEYS]
    missing = [key for key in _NEEDED if key not in given]
    if unknown or missing:
        wrong = f"{unknown[0]!r} is none of them" if unknown else f"{missing[0]!r} is missing"
        raise UserError(f"{place}: scale has {', '.join(_KEYS)}, as in {_FORM}; {wrong}")
    for other in ("sweep", "compare", "phases"):
        if other in mapping:
            raise UserError(f"{where.at((other,))}: a config has either `scale` or `{other}`")
    seeds = read_seeds(schema.plain(given["seeds"]), where, ("scale", "seeds"))
    backbones = _named(given["backbones"], where, ("scale", "backbones"))
    lines = _named(given["lines"], where, ("scale", "lines"))
    unknown = [name for name in only if name not in lines]
    if unknown:
        raise UserError(f"--only {unknown[0]!r} is not one of the lines: {', '.join(lines)}")
    whole = (mapping, where, overrides)
    tasks = {
        name: _task(name, options, where, ("scale", "tasks", name))
        for name, options in _tasks(given["tasks"], where, ("scale", "tasks")).items()
    }
    cells, output_dir = [], ""
    for task, task_setting in tasks.items():
        for line, options in lines.items():
            if only and line not in only:
                continue
            settings, shots, own = _line(line, options, backbones, where)
            for backbone, path in own.items():
                fixed = [task_setting, ("backbone.name", path, place), *settings]
                configs = [
                    resolved(mapping, where, overrides, RunConfig, [*fixed, ("seed", seed, place)])
                    for seed in seeds
                ]
                output_dir = configs[0].output_dir
                directory = Path(output_dir, *map(directory_word, (task, line, backbone)))
                cells.append(Cell(task, line, backbone, over_seeds(configs, directory), shots))
    places = [cell.sweep.output_dir for cell in cells]
    if len(set(places)) < len(places):
        twice = next(one for one in places if places.count(one) > 1)
        raise UserError(f"{place}: two names give the same directory {twice}; rename one")
    zero_shot = _zero_shot(schema.plain(given.get("zero_shot")), tasks, whole)
    pictures = _pictures(schema.plain(given.get("pictures")), lines, where)
    return Scale(output_dir, cells, zero_shot, pictures)


def _named(given: Any, where: schema.Where, path: tuple[str, ...]) -> dict[str, Any]:
    given = schema.plain(given)
    if not isinstance(given, Mapping) or not given:
        raise UserError(
            f"{where.at(path)}: {'.'.join(path)} must be a mapping of names, as in {_FORM}"
        )
    return {str(name): schema.plain(value) for name, value in given.items()}


def _tasks(given: Any, where: schema.Where, path: tuple[str, ...]) -> dict[str, Any]:
    """Options of tasks by name; a list of names has none."""
    given = schema.plain(given)
    if isinstance(given, list) and all(isinstance(schema.plain(name), str) for name in given):
        given = dict.fromkeys(map(schema.plain, given))
    return _named(given, where, path)


def _task(
    name: str, options: Any, where: schema.Where, path: tuple[str, ...]
) -> tuple[str, dict[str, Any], str]:
    """The setting that makes a run one of this task: the listed one of its name unless it says."""
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise UserError(
            f"{where.at(path)}: {'.'.join(path)} must be a mapping of a task's options, such as "
            "{source.data_dir: data/sst2}"
        )
    leaves = [(key, value, where.at(path)) for key, value, _ in schema.leaves(options)]
    own, _ = schema.set_values({}, where, leaves)
    if "preset" not in own and "input" not in own:
        own = {"preset": name, **own}
    return "task", own, where.at(path)


def _line(
    name: str, options: Any, backbones: Mapping[str, Any], where: schema.Where
) -> tuple[list[tuple[str, Any, str]], int | None, dict[str, str]]:
    """A line's options as (dotted key, value, place), its shots, and its backbones."""
    path = ("scale", "lines", name)
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise UserError(
            f"{where.at(path)}: scale.lines.{name} must be a mapping of a run's options, such as "
            "{method: {length: 5}}"
        )
    options = dict(options)
    shots = schema.plain(options.pop("shots", None))
    if shots is not None and (not isinstance(shots, int) or isinstance(shots, bool) or shots < 0):
        raise UserError(
            f"{where.at((*path, 'shots'))}: shots is {shots!r}; it has to be a whole number of "
            "examples from 0 on"
        )
    own = options.pop("backbones", None)
    own = dict(backbones) if own is None else _named(own, where, (*path, "backbones"))
    for backbone, directory in own.items():
        if backbone not in backbones:
            raise UserError(
                f"{where.at((*path, 'backbones'))}: {backbone!r} is none of scale.backbones "
                f"({', '.join(backbones)}), whose places in the picture a line's backbones take"
            )
        if not isinstance(directory, str):
            raise UserError(
                f"{where.at(('scale', 'backbones'))}: {backbone} must be a directory or a name on "
                f"the hub, got {schema.describe(directory)}"
            )
    settings = [
        (key, value, where.at((*path, *tail))) for key, value, tail in schema.leaves(options)
    ]
    for key, _, place in settings:
        if key.partition(".")[0] in _SHARED or key == "backbone.name":
            raise UserError(f"{place}: {key} is not a line's own; give it outside of `scale.lines`")
    if any(key == "tune" and value == "model" for key, value, _ in settings):
        settings.append(("train.at_once", 1, where.at(path)))  # weights are tuned one by one
    return settings, shots, own


def _zero_shot(
    given: Any,
    tasks: Mapping[str, Any],
    whole: tuple[dict[str, Any], schema.Where, Sequence[str]],
) -> dict[str, dict[str, TaskConfig]]:
    mapping, where, overrides = whole
    if given is None:
        return {}
    zero_shot: dict[str, dict[str, TaskConfig]] = {}
    for trained, others in _named(given, where, ("scale", "zero_shot")).items():
        path = ("scale", "zero_shot", trained)
        if trained not in tasks:
            raise UserError(
                f"{where.at(path)}: {trained!r} is none of scale.tasks ({', '.join(tasks)})"
            )
        zero_shot[trained] = {}
        for name, options in _tasks(others, where, path).items():
            setting = _task(name, options, where, (*path, name))
            config = resolved(mapping, where, overrides, RunConfig, [setting])
            zero_shot[trained][name] = config.task
    return zero_shot


def _pictures(
    given: Any, lines: Mapping[str, Any], where: schema.Where
) -> dict[str, Sequence[str]]:
    if given is None:
        return {}
    pictures = {}
    for name, drawn in _named(given, where, ("scale", "pictures")).items():
        place = where.at(("scale", "pictures", name))
        if not isinstance(drawn, list) or not drawn:
            raise UserError(f"{place}: scale.pictures.{name} must be a list of names of lines")
        pictures[directory_word(name)] = [str(schema.plain(line)) for line in drawn]
        unknown = [line for line in pictures[directory_word(name)] if line not in lines]
        if unknown:
            raise UserError(f"{place}: {unknown[0]!r} is none of scale.lines ({', '.join(lines)})")
    return pictures
