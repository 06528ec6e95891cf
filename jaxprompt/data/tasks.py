"""What a task is: fields of a row -> input text, target text, candidates and metrics, all as data.

Presets are `configs/tasks/*.yaml`; a new classification or generation task is a new file there, or
the same keys under `task:` in a run's config. No task needs code.
"""

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxprompt import schema
from jaxprompt.data.readers import Fields
from jaxprompt.data.sources import Source, SourceConfig, open_source
from jaxprompt.data.templates import fill, hole_names, lookup, parse_template
from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class MixedTask:
    """One task of a mixture.

    Attributes:
      rate: its share of the training examples, relative to the others' rates; null for all = their
        numbers of rows.
      cap: rows that count at most where rates go by numbers of rows; T5's limit.
      task: the keys of a `TaskConfig`; a run's config may give a listed task's name instead.
    """

    rate: float | None = None
    cap: int = 2**19
    task: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.rate is not None and not self.rate > 0:
            raise UserError(f"rate is {self.rate}, it has to be above 0; or leave the task out")
        if self.cap < 1:
            raise UserError(f"cap is {self.cap}, it has to be at least 1")


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """A task as its YAML file says it; templates are those of `data.templates`.

    Attributes:
      name: what it is called in messages and artifacts.
      description: one line for `jaxprompt tasks`.
      source: where the rows are.
      input: template of the input text.
      target: template of the target, before `labels`.
      labels: target as the rows have it -> the word to predict; a word itself is accepted as well.
      candidates: the words a prediction is chosen from; empty = those of `labels`, and with neither
        the task is one of free generation.
      metrics: names from `metrics.METRICS`; empty = accuracy with candidates, else exact_match.
      positive_label: the candidate that F1 looks for.
      group: template of a key that says which rows are scored together (MultiRC: a question's).
      references: the field that lists every answer that is right, for metrics of texts; empty = the
        target alone.
      init_words: what a prompt's `labels` init begins from where there are no candidates.
      replace: text -> replacement, carried out in every text field of a row, in this order.
      mixture: tasks to train on together, by name, in place of all the above but `name` and
        `description`; in a run's config also a list of listed tasks, or their rates.
    """

    name: str = ""
    description: str = ""
    source: SourceConfig = dataclasses.field(default_factory=SourceConfig)
    input: str = "{text}"
    target: str = "{label}"
    labels: dict[str, str] = dataclasses.field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    positive_label: str = ""
    group: str = ""
    references: str = ""
    init_words: tuple[str, ...] = ()
    replace: dict[str, str] = dataclasses.field(default_factory=dict)
    mixture: dict[str, MixedTask] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if not self.mixture:
            return
        if len(self.mixture) == 1:
            raise UserError(f"mixture has one task only; write task: {next(iter(self.mixture))}")
        for name in self.mixture:
            if not re.fullmatch(r"[\w+-][\w.+-]*", name):
                raise UserError(f"mixture has the name {name!r}, which cannot name a directory")
        for field in dataclasses.fields(self):
            if field.name in ("name", "description", "mixture"):
                continue
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if getattr(self, field.name) != default:
                raise UserError(
                    f"{field.name} is given beside mixture, whose tasks have their own: put it "
                    f"under mixture.NAME.task"
                )


@dataclasses.dataclass(frozen=True)
class Example:
    """One row of a task.

    Attributes:
      fields: the row's fields and `input`, for a layout's texts.
      input_text: the input template filled.
      target: what is to be predicted, None where there is none (or none was asked for).
      label: the target's position among the task's candidates, -1 without candidates or target.
      group: which rows are scored together with this one, "" if none.
      references: every right answer, where the task names a field of them.
      where: where the row stands.
    """

    fields: Mapping[str, Any]
    input_text: str
    target: str | None = None
    label: int = -1
    group: str = ""
    where: str = "input"
    references: tuple[str, ...] = ()

    @classmethod
    def of_text(cls, text: str, where: str = "input") -> "Example":
        """An example that is nothing but an input text."""
        return cls({"input": text}, text, where=where)


class Task:
    """A task ready for use.

    Attributes: config; candidates, () for free generation; metrics, names with the defaults
      filled in.
    """

    def __init__(self, config: TaskConfig):
        """Raises: UserError for an unreadable template, or labels and candidates at odds."""
        self.config = config
        self._input = parse_template(config.input)
        self._target = parse_template(config.target)
        self._group = parse_template(config.group)
        self.candidates = config.candidates or tuple(dict.fromkeys(config.labels.values()))
        self.metrics = config.metrics or (("accuracy",) if self.candidates else ("exact_match",))
        self._check()

    def open(self, split: str) -> Source:
        """The rows of a split; see `sources.open_source`."""
        return open_source(self.config.source, split)

    def example(self, row: Fields, where: str, with_target: bool = True) -> Example:
        """Turns a row into an example.

        Args:
          with_target: False leaves target, label and group out, and needs no fields for them.
        Raises: UserError for a missing field, a label outside the candidates, an empty target.
        """
        fields = {key: self._replaced(value) for key, value in row.items()}
        text = fill(self._input, fields, where)
        fields["input"] = text
        if not with_target:
            return Example(fields, text, where=where)
        target = self._word(fill(self._target, fields, where).strip(), where)
        label = self.candidates.index(target) if self.candidates else -1
        group = fill(self._group, fields, where)
        return Example(fields, text, target, label, group, where, self._references(fields, where))

    @property
    def text_field(self) -> str:
        """The one field that the input template uses, for rows that are plain text.

        Raises: UserError if it uses none or several.
        """
        names = hole_names(self._input)
        if len(names) != 1:
            raise UserError(
                f"task {self.config.name} makes its input of {', '.join(names) or 'no field'};"
                " give rows with these fields (JSONL, CSV or TSV) instead of plain text"
            )
        return names[0]

    def _references(self, fields: Fields, where: str) -> tuple[str, ...]:
        if not self.config.references:
            return ()
        name = self.config.references
        listed = lookup(fields, name, where)
        if not isinstance(listed, list) or not all(isinstance(one, str) for one in listed):
            raise UserError(f"{where}: field {name!r} should be a list of answers, not {listed!r}")
        return tuple(listed)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, str):
            for old, new in self.config.replace.items():
                value = value.replace(old, new)
        return value

    def _word(self, target: str, where: str) -> str:
        if not target:
            raise UserError(f"{where}: the target {self.config.target!r} is empty")
        word = self.config.labels.get(target, target)
        if self.candidates and word not in self.candidates:
            known = dict.fromkeys((*self.config.labels, *self.candidates))
            raise UserError(
                f"{where}: label {target!r} is not among those of task {self.config.name}:"
                f" {', '.join(known)}"
            )
        return word

    def _check(self) -> None:
        name, candidates = self.config.name or "the task", self.candidates
        if len(set(candidates)) < len(candidates):
            raise UserError(f"{name} names a candidate twice: {', '.join(candidates)}")
        for label, word in self.config.labels.items():
            if word not in candidates:
                raise UserError(f"{name} gives label {label!r} the word {word!r}, not a candidate")
        positive = self.config.positive_label
        if positive and positive not in candidates:
            raise UserError(f"{name} has positive_label {positive!r}, which is not a candidate")


def load_task(name: str | Path | Mapping[str, Any]) -> Task:
    """A task by its preset's name, the path of a YAML file, or its keys.

    Raises: UserError for an unknown name (the nearest is suggested), key, or type.
    """
    mapping, where = (name, "task") if isinstance(name, Mapping) else read_task(name)
    return Task(schema.from_mapping(TaskConfig, mapping, where))


def read_task(name: str | Path) -> tuple[dict[str, Any], schema.Where]:
    """The keys of a preset or a YAML file as they stand there, for a config to build on.

    Raises: UserError for an unknown name (the nearest is suggested).
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = _preset_directory() / f"{name}.yaml"
    if not path.is_file():
        known = list_tasks()
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
        raise UserError(f"there is no task {str(name)!r}; {hint}")
    return schema.read_yaml(path)


def list_tasks() -> dict[str, str]:
    """Names of the presets, with the line that describes each."""
    names = sorted(path.stem for path in _preset_directory().glob("*.yaml"))
    return {name: load_task(name).config.description for name in names}


def _preset_directory() -> Path:
    return schema.configs_directory() / "tasks"
