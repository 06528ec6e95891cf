"""`jaxprompt tasks | methods | recipes | backbones`: what there is, one line each."""

import argparse
import importlib
import json
from collections.abc import Callable, Mapping

Lines = Mapping[str, str]


def main(args: argparse.Namespace) -> None:
    """Prints the list that `args.command` names: aligned columns, or JSON objects with `--json`."""
    lines = _LISTS[args.command]()
    if args.json:
        for name, text in lines.items():
            print(json.dumps({"name": name, "description": text}, ensure_ascii=False))
        return
    width = max(map(len, lines), default=0)
    for name, text in lines.items():
        print(f"{name:<{width}}  {text}")


def _tasks() -> Lines:
    return importlib.import_module("jaxprompt.data.tasks").list_tasks()


def _methods() -> Lines:
    methods = importlib.import_module("jaxprompt.prompts").METHODS
    return {name: f"{info.formula} ({info.paper})" for name, info in methods.items()}


def _recipes() -> Lines:
    optim = importlib.import_module("jaxprompt.optim")
    return {name: optim.describe(name).removeprefix(f"{name}: ") for name in optim.RECIPES}


def _backbones() -> Lines:
    return importlib.import_module("jaxprompt.t5.backbones").list_backbones()


_LISTS: dict[str, Callable[[], Lines]] = {
    "backbones": _backbones,
    "methods": _methods,
    "recipes": _recipes,
    "tasks": _tasks,
}
