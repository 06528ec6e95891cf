"""Listed tasks put into a config's mapping: `task: NAME`, `task: {preset: NAME}` and mixtures."""

from collections.abc import Mapping
from typing import Any

from jaxprompt import schema
from jaxprompt.data.tasks import TaskConfig, read_task
from jaxprompt.typing import UserError

_MIXTURE = ("task", "mixture")


def with_presets(
    mapping: Mapping[str, Any], where: schema.Where
) -> tuple[dict[str, Any], schema.Where]:
    """Puts listed tasks' keys, their sources' too, under those that the config gives itself.

    The short forms of a mixture become the long one: `mixture: {NAME: {rate, task: {...}}}`.

    Raises: UserError for an unknown name (the nearest is suggested), or an entry of another form.
    """
    task = schema.plain(mapping.get("task"))
    mixture = schema.plain(task.get("mixture")) if isinstance(task, Mapping) else None
    if mixture:
        assert isinstance(task, Mapping)
        entries, where = _entries(mixture, where)
        name = "+".join(entries)
        return {**mapping, "task": {"name": name, **task, "mixture": entries}}, where
    whole, where = _task(task, where, ("task",))
    return ({**mapping, "task": whole} if whole is not None else dict(mapping)), where


def complete_mixture(mapping: Mapping[str, Any], where: schema.Where) -> dict[str, Any]:
    """The mapping with every task of a mixture complete and checked, once nothing else is set.

    Raises: UserError for a key or a value that a task has not.
    """
    task = schema.plain(mapping.get("task"))
    mixture = schema.plain(task.get("mixture")) if isinstance(task, Mapping) else None
    if not mixture:
        return dict(mapping)
    assert isinstance(task, Mapping)
    entries = {}
    for name, entry in mixture.items():
        path = (*_MIXTURE, name, "task")
        places = {key[len(path) :]: at for key, at in where.places.items() if key[:4] == path}
        own = schema.from_mapping(TaskConfig, entry["task"], schema.Where(where.at(path), places))
        if own.mixture:
            raise UserError(f"{where.at(path)}: {name} of task.mixture is a mixture itself")
        entries[name] = {**entry, "task": {**schema.to_mapping(own), "name": own.name or name}}
    return {**mapping, "task": {**task, "mixture": entries}}


def _entries(mixture: Any, where: schema.Where) -> tuple[dict[str, Any], schema.Where]:
    """Every task of a mixture in the long form."""
    if isinstance(mixture, list) and all(isinstance(name, str) for name in mixture):
        mixture = dict.fromkeys(mixture)
    place = where.at(_MIXTURE)
    if not isinstance(mixture, Mapping):
        raise UserError(
            f"{place}: task.mixture must be a list of tasks' names or `NAME: rate` lines, got "
            f"{schema.describe(mixture)}"
        )
    entries: dict[str, Any] = {}
    for name, value in mixture.items():
        value, path = schema.plain(value), (*_MIXTURE, name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            value = {"rate": value}
        if not (value is None or isinstance(value, Mapping)):
            raise UserError(
                f"{where.at(path)}: task.mixture.{name} must be a rate or a mapping with the keys "
                f"rate, cap and task, got {schema.describe(value)}"
            )
        entry: dict[str, Any] = dict(value or {})
        given = schema.plain(entry.get("task", name))
        task, where = _task(given, where, (*path, "task"))
        entries[name] = {**entry, "task": given if task is None else task}
    return entries, where


def _task(
    given: Any, where: schema.Where, path: schema.KeyPath
) -> tuple[dict[str, Any] | None, schema.Where]:
    """The keys of one task with its preset's under them; None where it has no preset."""
    own = dict(given) if isinstance(given, Mapping) else {}
    name = schema.plain(own.pop("preset", None)) if own else given
    if not isinstance(name, str):
        return None, where
    try:
        preset, preset_where = read_task(name)
    except UserError as error:
        raise UserError(f"{where.at(path)}: {error}") from error
    places = {(*path, *key): place for key, place in preset_where.places.items()}
    source = schema.plain(own.get("source"))
    if isinstance(source, Mapping):
        own["source"] = {**preset.get("source", {}), **source}
    return {**preset, **own}, schema.Where(where.source, {**places, **where.places})
