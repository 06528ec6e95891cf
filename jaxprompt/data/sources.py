"""Where rows come from: JSONL, CSV, TSV and text files, TFDS, Hugging Face datasets; one interface.

A `Source` is a list of rows (dicts) that knows where each row stands, so that an error can name the
line.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np

from jaxprompt.data.readers import (
    FILE_KINDS,
    OPENERS,
    CsvSource,
    Fields,
    JsonlSource,
    TextSource,
    TsvSource,
    file_suffix,
)
from jaxprompt.data.superglue import RESHAPERS
from jaxprompt.typing import UserError

PACKAGE = "package://"  # a path that begins so lies in the package's assets
SPLITS = ("train", "validation", "test")

_ASSETS = Path(__file__).parents[1] / "assets"


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Where a task's rows are.

    Attributes:
      kind: jsonl, csv, tsv, text, tfds or hf; "" = tfds for a `name` without a `data_dir`, else by
        the files' endings. With both a `name` and files, `data_dir` is the files' place; for a set
        that TFDS prepared there, say tfds.
      train, validation, test: files (plain, .gz or .xz; `package://...` in the package itself);
        with tfds and hf the splits' names where they differ from these.
      name: a TFDS name such as `glue/sst2`, or a hub name such as `owner/set` or
        `owner/set:config`.
      data_dir: the files' directory; with tfds and hf where prepared data lies.
      columns: a CSV or TSV file's fields, for files without a header line.
      rename: field -> the name that templates use; fields that are not there are passed over.
      explode: a path such as `passage.questions.answers`: every list on it becomes a row per
        element.
      reshape: `record` or `wsc`: rows of that SuperGLUE task, made as T5 makes them.
    """

    kind: str = ""
    train: str = ""
    validation: str = ""
    test: str = ""
    name: str = ""
    data_dir: str = ""
    columns: tuple[str, ...] = ()
    rename: dict[str, str] = dataclasses.field(default_factory=dict)
    explode: str = ""
    reshape: Literal["", "record", "wsc"] = ""


class Source(Protocol):
    """Random access to rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Fields: ...

    def where(self, index: int) -> str:
        """Where row `index` stands, for messages: `file:line`, or `name split row n`."""
        ...


def open_source(config: SourceConfig, split: str) -> Source:
    """One split of a source, its fields renamed and lists exploded as the config says.

    Args:
      split: "train", "validation" or "test".
    Raises: UserError for an unknown kind, a missing file or package, data not prepared, no rows.
    """
    if split not in SPLITS:
        raise UserError(f"there is no split {split!r}; there are {', '.join(SPLITS)}")
    kind = _kind(config, split)
    if kind not in _READERS:
        raise UserError(f"source.kind is {kind!r}; there are {', '.join(_READERS)}")
    source = _READERS[kind](config, split)
    if not len(source):
        raise UserError(f"{_describe(config, split)} has no rows")
    if config.reshape:
        source = _Remade(source, RESHAPERS[config.reshape], training=split == "train")
    if config.rename or config.explode:
        source = _Reshaped(source, config.rename, config.explode)
    return source


def has_split(config: SourceConfig, split: str) -> bool:
    """Whether the config names that split (a file), or its kind has splits by name."""
    return bool(getattr(config, split)) or _kind(config, split) in ("tfds", "hf")


class _Records:
    """Rows of a library's data set: bytes become text, arrays numbers and lists."""

    def __init__(self, rows: Any, name: str):
        self._rows, self._name = rows, name

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Fields:
        return _plain(self._rows[index])

    def where(self, index: int) -> str:
        return f"{self._name} row {index}"


class _Remade:
    """A source whose rows a function makes anew, each into none, one or several."""

    def __init__(self, source: Source, reshape: Callable[..., list[Fields]], *, training: bool):
        self._source, self._reshape, self._training = source, reshape, training
        self._places = [
            (row, number) for row in range(len(source)) for number in range(len(self._rows(row)))
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Fields:
        row, number = self._places[index]
        return self._rows(row)[number]

    def where(self, index: int) -> str:
        return self._source.where(self._places[index][0])

    def _rows(self, row: int) -> list[Fields]:
        return self._reshape(self._source[row], self._source.where(row), self._training)


class _Reshaped:
    """A source with lists exploded into rows and fields renamed."""

    def __init__(self, source: Source, rename: Mapping[str, str], explode: str):
        self._source, self._rename = source, rename
        self._path = explode.split(".") if explode else []
        self._places = [
            (row, place)
            for row in range(len(source))
            for place in _places(source[row], self._path, source.where(row))
        ] if explode else None  # fmt: skip

    def __len__(self) -> int:
        return len(self._source if self._places is None else self._places)

    def __getitem__(self, index: int) -> Fields:
        row, place = (index, ()) if self._places is None else self._places[index]
        fields = _at_place(self._source[row], self._path, list(place))
        for old, new in self._rename.items():
            value: Any = fields
            for key in [old] if old in fields else old.split("."):
                value = value.get(key) if isinstance(value, Mapping) else None
            if value is not None:
                fields.pop(old, None)
                fields[new] = value
        return fields

    def where(self, index: int) -> str:
        return self._source.where(index if self._places is None else self._places[index][0])


def _kind(config: SourceConfig, split: str) -> str:
    if config.kind:
        return config.kind
    paths = [path for path in (config.train, config.validation, config.test) if path]
    placed = any(path.startswith(PACKAGE) or Path(path).is_absolute() for path in paths)
    if config.name and not (paths and (config.data_dir or placed)):
        return "tfds"
    return FILE_KINDS.get(file_suffix(getattr(config, split)), "jsonl")


def _describe(config: SourceConfig, split: str) -> str:
    return getattr(config, split) or f"{config.name} {split}"


def _path(config: SourceConfig, split: str) -> Path:
    """The file of a split; its .xz or .gz when only that is there."""
    given = getattr(config, split)
    if not given:
        raise UserError(f"the task has no {split} data; set task.source.{split} to a file")
    if given.startswith(PACKAGE):
        return _ASSETS / given.removeprefix(PACKAGE)
    path = Path(config.data_dir).expanduser() / Path(given).expanduser()
    packed = (path.with_name(path.name + ending) for ending in OPENERS)
    return path if path.exists() else next((p for p in packed if p.exists()), path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, bytes):
        return value.decode("utf-8")
    if isinstance(value, np.ndarray | list | tuple):
        return [_plain(item) for item in value]
    return value.item() if isinstance(value, np.generic) else value


def _places(value: Any, path: Sequence[str], where: str) -> Iterator[tuple[int, ...]]:
    """Positions in each list along a path, one tuple for every row it explodes to."""
    if isinstance(value, list):
        for position, item in enumerate(value):
            for rest in _places(item, path, where):
                yield (position, *rest)
    elif not path:
        yield ()
    elif isinstance(value, Mapping) and path[0] in value:
        yield from _places(value[path[0]], path[1:], where)
    else:
        raise UserError(f"{where} has no field {path[0]!r} of source.explode")


def _at_place(value: Any, path: Sequence[str], place: list[int]) -> Any:
    """`value` with every list along a path replaced by its element at `place`."""
    while isinstance(value, list) and place:
        value = value[place.pop(0)]
    if not path or not isinstance(value, Mapping):
        return dict(value) if isinstance(value, Mapping) else value
    return {**value, path[0]: _at_place(value[path[0]], path[1:], place)}


def _library_split(config: SourceConfig, split: str) -> str:
    """A split's name in a library; file names, which a preset may hold as well, do not count."""
    given = getattr(config, split)
    return given if given and file_suffix(given) not in FILE_KINDS else split


def _tfds(config: SourceConfig, split: str) -> Source:
    import tensorflow_datasets as tfds

    place = config.data_dir or None
    try:
        builder: Any = tfds.builder(config.name, data_dir=place)
        is_prepared = builder.is_prepared()
    except ValueError:  # without TensorFlow, TFDS knows of many sets only what is prepared
        is_prepared = False
    if not is_prepared:
        option = f" --data_dir={place}" if place else ""
        raise UserError(
            f"the TFDS data set {config.name} is not prepared in {place or 'TFDS_DATA_DIR'}: run"
            f" `tfds build {config.name} --file_format=array_record{option}` where TensorFlow is"
            " installed, or set task.source.data_dir to the directory of its original files"
        )
    name = _library_split(config, split)
    try:
        return _Records(builder.as_data_source(split=name), f"{config.name} {name}")
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"{config.name} {name} cannot be read by index: {error}") from error


def _hf(config: SourceConfig, split: str) -> Source:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            "source.kind hf needs the package datasets; install it with: pip install jaxprompt[hf]"
        ) from None
    name = _library_split(config, split)
    path, _, subset = config.name.partition(":")
    try:
        if config.data_dir:
            rows = datasets.load_from_disk(config.data_dir)[name]
        else:
            rows = datasets.load_dataset(path, subset or None, split=name)
    except (OSError, ValueError, KeyError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{config.name or config.data_dir} {name} cannot be loaded: {reason}"
        ) from error
    return _Records(rows, f"{config.name or config.data_dir} {name}")


_READERS: dict[str, Callable[[SourceConfig, str], Source]] = {
    "jsonl": lambda config, split: JsonlSource(_path(config, split)),
    "csv": lambda config, split: CsvSource(_path(config, split), config.columns),
    "tsv": lambda config, split: TsvSource(_path(config, split), config.columns),
    "text": lambda config, split: TextSource(_path(config, split)),
    "tfds": _tfds,
    "hf": _hf,
}
