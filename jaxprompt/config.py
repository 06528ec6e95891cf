"""Everything a run can be told, composed from the options of the rooms, and the way it is read.

`load_config` reads a YAML file and `key.sub=value` overrides into `RunConfig` (train) or
`PretrainConfig` (pretrain); `dump` writes the complete YAML that repeats the run.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from jaxprompt import schema
from jaxprompt.data.encoder import DataConfig
from jaxprompt.data.presets import complete_mixture, with_presets
from jaxprompt.data.pretraining import MixtureConfig, MixtureEntry
from jaxprompt.data.tasks import TaskConfig
from jaxprompt.distil import NO_TEACHER, DistilConfig
from jaxprompt.logging import LoggingConfig
from jaxprompt.loop import LoopConfig
from jaxprompt.optim import OptimConfig, resolve
from jaxprompt.prompts import METHODS
from jaxprompt.prompts.base import MethodConfig
from jaxprompt.recipes import RECIPES
from jaxprompt.regularize import RegularizeConfig
from jaxprompt.schema import dump
from jaxprompt.steps import StepOptions
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.typing import UserError

__all__ = [
    "BackboneConfig",
    "MeshConfig",
    "PretrainConfig",
    "RunConfig",
    "TrainConfig",
    "config_names",
    "dump",
    "load_config",
]

C = TypeVar("C", "RunConfig", "PretrainConfig")

# sections that make a config one of several runs, beside `sweep` and `phases`: also their commands
_OTHERS = {"compare": "compares methods", "scale": "goes over backbones of several sizes"}
_SEVERAL = ("sweep", "phases", *_OTHERS)
_WHOLE_TASKS = ("task", "task.preset", "task.mixture")


@dataclasses.dataclass(frozen=True)
class BackboneConfig:
    """Which backbone, and how it is computed.

    Attributes:
      name: "jaxprompt-mini", a local directory, or a name on the Hugging Face hub.
      revision: of a hub name: branch, tag or commit; null = the newest.
      dtype, scan_unroll, remat, attention: as in `t5.config.Compute`.
      quantize: "int8" or "int4": weights of a half or a quarter of bfloat16's size; "none" = float;
        null = as they are stored.
      dropout: inside the backbone while training; the recipe's unless given.
    """

    name: str = "jaxprompt-mini"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    scan_unroll: int = 0
    remat: Literal["auto", "none", "frozen", "frozen_mlp", "frozen_attention", "full", "dots"] = (
        "auto"
    )
    attention: Literal["auto", "plain", "chunked", "windowed", "rowwise"] = "auto"
    quantize: Literal["none", "int8", "int4"] | None = None
    dropout: float | None = None

    def __post_init__(self):
        if self.dropout is not None and not 0 <= self.dropout < 1:
            raise UserError(
                f"backbone.dropout is {self.dropout}, it must be at least 0 and below 1"
            )

    def compute(self) -> Compute:
        """The part that says how it is computed."""
        return Compute(self.dtype, self.scan_unroll, self.remat, self.attention)

    def check_trainable(self, who: str) -> None:
        """Raises: UserError if its weights are to be quantised: `who` would train them."""
        if self.quantize in ("int8", "int4"):
            raise UserError(
                f"{who} trains the backbone's weights, and quantised ones cannot be trained: leave "
                f"out backbone.quantize ({self.quantize})"
            )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged.

    Attributes:
      data: groups of devices that see different rows; -1 = as many as there are.
      model: devices that share one copy of the backbone.
      weights_over_data: divide the backbone's weights over `data` as well: less memory, more
        communication.
      rows_over_model: divide what stands between matmuls over `model` as well, by rows, where they
        divide: less memory and work, as much communication.
    """

    data: int = -1
    model: int = 1
    weights_over_data: bool = False
    rows_over_model: bool = False

    def __post_init__(self):
        for name in ("data", "model"):
            size = getattr(self, name)
            if size < 1 and not (name == "data" and size == -1):
                raise UserError(f"mesh.{name} is {size}, it must be at least 1")


@dataclasses.dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """`LoopConfig` and what a step minimises.

    Attributes:
      metric: which of the task's metrics is the score that `best/` and early stopping go by; empty
        = its first.
      at_once: prompts of a sweep that are trained together, the next ones after them; 0 = all.
      loss_by: what the loss is averaged over.
      z_loss: weight of the squared log-partition; null = the recipe's.
    """

    metric: str = ""
    at_once: int = 0
    loss_by: Literal["tokens", "examples"] = "tokens"
    z_loss: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.at_once < 0:
            raise UserError(f"train.at_once is {self.at_once}, it cannot be negative")


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """A training run.

    Attributes:
      output_dir: the run's directory; resumed from if it holds this run.
      task: a name that `jaxprompt tasks` lists, or a mapping (`preset: NAME` starts from a listed
        one, the keys beside it replace its own, those of `source` one by one;
        `mixture: [NAME, ...]` or `mixture: {NAME: rate, ...}` is several at once).
      seed: of everything random.
      tune: "prompt" trains the method over a frozen backbone, "model" the backbone itself.
      layout: where slots stand among the text, see `data.layout`.
      distil: trained prompts as teachers.
      regularize: what holds the prompt back in training.
    """

    output_dir: str
    task: TaskConfig
    seed: int = 0
    tune: Literal["prompt", "model"] = "prompt"
    backbone: BackboneConfig = BackboneConfig()
    method: MethodConfig = MethodConfig()
    layout: str = "{prompt}{input}"
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    regularize: RegularizeConfig = RegularizeConfig()
    train: TrainConfig = TrainConfig()
    distil: DistilConfig = DistilConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self):
        if self.tune == "model":
            self.backbone.check_trainable("tune: model")
            if self.distil.is_on:
                raise UserError("distil teaches prompts; leave it out with tune: model")
            if self.regularize.is_on:
                raise UserError("regularize is for prompts, and tune: model trains none")

    def compute(self) -> Compute:
        """How the backbone is computed, on a mesh that is still to be made."""
        return dataclasses.replace(
            self.backbone.compute(), rows_over_model=self.mesh.rows_over_model
        )


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run: all parameters of a backbone.

    Attributes:
      output_dir: the run's directory; resumed from if it holds this run.
      mixture: what is trained on.
      validation: what the loss is measured on, entry by entry; may be empty.
      seed: of everything random.
      backbone: what to start from, unless `model` is given, and how it is computed.
      model: sizes of a backbone that starts from random numbers.
      tokenizer: directory of the vocabulary that goes with `model`.
      eval_batches: batches of each validation entry an evaluation takes, always the same ones.
      export_dtype: of the backbone that every evaluation writes to `output_dir/backbone`.
    """

    output_dir: str
    mixture: MixtureConfig
    validation: tuple[MixtureEntry, ...] = ()
    seed: int = 0
    backbone: BackboneConfig = BackboneConfig()
    model: T5Config | None = None
    tokenizer: str = ""
    optim: OptimConfig = OptimConfig(recipe="pretrain")
    train: TrainConfig = TrainConfig()
    mesh: MeshConfig = MeshConfig()
    logging: LoggingConfig = LoggingConfig()
    eval_batches: int = 16
    export_dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self):
        if (self.model is None) != (not self.tokenizer):
            raise UserError(
                "`model` (sizes of a new backbone) and `tokenizer` (directory of its vocabulary) "
                "go together: give both, or neither to start from `backbone.name`"
            )
        self.backbone.check_trainable("pretraining")


def load_config(
    path_or_name: str | Path, overrides: Sequence[str] = (), kind: type[C] = RunConfig
) -> C:
    """Reads the options of a run.

    Args:
      path_or_name: a YAML file, or the name of a config that ships with jaxprompt.
      overrides: `key.sub=value` strings, later ones win; values are YAML.
      kind: `RunConfig` or `PretrainConfig`.
    Raises: UserError for a file that cannot be found or read, an unknown key (the nearest valid one
      is suggested), a missing key or a wrong type; with file and line, or the override.
    """
    mapping, where = read_config(path_or_name, overrides)
    refuse_several(mapping, where)
    if kind is RunConfig and "sweep" in mapping:
        raise UserError(
            f"{where.at(('sweep',))}: this config has a sweep, so it is several runs; "
            "`jaxprompt train` runs them, jaxprompt.load_sweep reads them"
        )
    if kind is PretrainConfig and "phases" in mapping:
        raise UserError(
            f"{where.at(('phases',))}: this config has phases, so it is several runs; "
            "`jaxprompt pretrain` runs them"
        )
    return resolved(mapping, where, overrides, kind)


def read_config(
    path_or_name: str | Path, overrides: Sequence[str]
) -> tuple[dict[str, Any], schema.Where]:
    """The file over those it extends, with the overrides of what makes it several runs."""
    mapping, where = schema.read_extended(_find(path_or_name), _find)
    own = [override for override in overrides if _of_several(override)]
    return schema.apply_overrides(mapping, where, own)


def refuse_several(mapping: Mapping[str, Any], where: schema.Where) -> None:
    """Raises: UserError for a config that another command runs: of a `compare:` or a `scale:`."""
    for key, told in _OTHERS.items():
        if key in mapping:
            raise UserError(f"{where.at((key,))}: this config {told}; `jaxprompt {key}` runs it")


def resolved(
    mapping: Mapping[str, Any],
    where: schema.Where,
    overrides: Sequence[str],
    kind: type[C],
    settings: Sequence[tuple[str, Any, str]] = (),
) -> C:
    """A run's options, of a mapping with overrides and then a sweep's settings on top."""
    overrides = [one for one in overrides if not _of_several(one)]
    # A task named on the command line comes first: `task=NAME task.sub=value` works in any order.
    whole = [one for one in overrides if one.partition("=")[0] in _WHOLE_TASKS]
    parts = [override for override in overrides if override not in whole]
    tasks = [setting for setting in settings if setting[0] in _WHOLE_TASKS]
    mapping, where = schema.apply_overrides(mapping, where, whole)
    mapping, where = schema.set_values(mapping, where, tasks)
    mapping, where = with_presets(mapping, where)
    mapping, where = schema.apply_overrides(mapping, where, parts)
    others = [setting for setting in settings if setting not in tasks]
    mapping, where = schema.set_values(mapping, where, others)
    if kind is RunConfig:
        mapping = _with_recipe(complete_mixture(mapping, where))
    return with_tasks(schema.from_mapping(kind, mapping, where))


def step_options(config: RunConfig | PretrainConfig) -> StepOptions:
    """What is compiled into a run's step; where the config leaves it open, the recipe's."""
    recipe, dropout, z_loss = resolve(config.optim), config.backbone.dropout, config.train.z_loss
    return StepOptions(
        z_loss=recipe.z_loss if z_loss is None else z_loss,
        loss_by=config.train.loss_by,
        dropout_rate=recipe.dropout if dropout is None else dropout,
        draws=isinstance(config, RunConfig) and METHODS[config.method.name].draws(config.method),
        accumulate=config.train.accumulate,
        distil=config.distil.distances() if isinstance(config, RunConfig) else NO_TEACHER,
        **_regularizers(config),
    )


def _regularizers(config: RunConfig | PretrainConfig) -> dict[str, Any]:
    """Without the text, whose embeddings are an argument: one program for all texts."""
    if not isinstance(config, RunConfig):
        return {}
    quiet = dataclasses.replace(config.regularize, wayward=0.0, wayward_text="")
    return {"regularize": quiet, "wayward": config.regularize.wayward}


def config_names(folder: str = "") -> list[str]:
    """Names of the configs that ship with jaxprompt, or of those in one folder of them."""
    root = schema.configs_directory() / folder
    return sorted(
        path.relative_to(root).with_suffix("").as_posix() for path in root.rglob("*.yaml")
    )


def _of_several(override: str) -> bool:
    """Whether it changes a section that makes the config several runs."""
    return override.partition("=")[0].partition(".")[0] in _SEVERAL


def _find(path_or_name: str | Path) -> Path:
    if Path(path_or_name).is_file():
        return Path(path_or_name)
    name = str(path_or_name)
    names = config_names()
    if name in names:
        return schema.configs_directory() / f"{name}.yaml"
    runs = [known for known in names if not known.startswith("tasks/")]
    near = difflib.get_close_matches(name, runs, 1)
    hint = f"did you mean {near[0]!r}?" if near else f"those that ship are {', '.join(runs)}"
    raise UserError(f"there is no config file {name!r} and no config of that name ships; {hint}")


def with_tasks(config: C) -> C:
    """The run with the tasks of its mixture where the method has parts for each.

    Raises: UserError if the config names others, or a task's parts to begin from without a prompt.
    """
    if not isinstance(config, RunConfig) or not METHODS[config.method.name].task_parts:
        return config
    if (wanted := getattr(config.method, "init_task", "")) and config.method.init != "prompt":
        raise UserError(
            f"method.init_task is {wanted!r}, but method.init is {config.method.init!r}: it picks "
            "a task's parts of the artifact at method.init_path, with method.init=prompt"
        )
    names, given = tuple(config.task.mixture), getattr(config.method, "tasks", ())
    if given and given != names:
        raise UserError(
            f"method.tasks is {', '.join(given)}, the run's are {', '.join(names) or 'one'}: leave "
            "method.tasks out, it is filled in"
        )
    return dataclasses.replace(config, method=dataclasses.replace(config.method, tasks=names))


def _with_recipe(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Puts what the recipe fixes beside the optimizer where the config leaves it open."""
    names = ("optim", "train", "task", "method")
    sections = {name: schema.plain(mapping.get(name)) for name in names}
    optim, train, task, method = (
        value if isinstance(value, dict) else {} for value in sections.values()
    )
    recipe = RECIPES.get(str(schema.plain(optim.get("recipe", OptimConfig.recipe))))
    if recipe is None:
        return dict(mapping)
    is_soft = method.get("name", MethodConfig.name) == MethodConfig.name
    kinds = [task, *(entry["task"] for entry in (task.get("mixture") or {}).values())]
    words = ("candidates", "labels", "init_words")
    has_labels = any(kind.get(key) for kind in kinds for key in words)
    fixed = {
        "data": {"batch_size": recipe.batch_size},
        "backbone": {"dropout": recipe.dropout},
        "train": {"z_loss": recipe.z_loss} | ({} if "epochs" in train else {"steps": recipe.steps}),
        "method": ({"length": recipe.length} if recipe.length and is_soft else {})
        | {
            "init": recipe.init if has_labels or recipe.init != "labels" else "vocab",
            "init_low": recipe.init_low,
            "init_high": recipe.init_high,
        },
    }
    completed = dict(mapping)
    for section, values in fixed.items():
        own = schema.plain(mapping.get(section))
        if own is None or isinstance(own, Mapping):  # else: a wrong type, said when it is read
            completed[section] = {**values, **(own or {})}
    return completed
