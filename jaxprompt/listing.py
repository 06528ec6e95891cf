"""`jaxprompt tasks | methods | recipes | backbones`: what there is, a line or a few each."""

import argparse
import importlib
import json
from collections.abc import Callable, Mapping

Lines = Mapping[str, str]


def main(args: argparse.Namespace) -> None:
    """Prints the list that `args.command` names: aligned columns, or JSON objects with `--json`."""
    if args.command == "methods":
        _print_methods(args)
        return
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


def _print_methods(args: argparse.Namespace) -> None:
    """Every prompt method with what it trains over a backbone, at its own defaults."""
    methods = importlib.import_module("jaxprompt.prompts").METHODS
    backbones = importlib.import_module("jaxprompt.t5.backbones")
    sizes = backbones.read_config(backbones.resolve_backbone(args.backbone))
    told = [
        {
            "name": name,
            "formula": info.formula,
            "parameters": info.parameters(info.config(), sizes),
            "length": info.config().length,
            "backbone": args.backbone,
            "cost": info.cost,
            "folds": info.fold is not None,
            "paper": info.paper,
        }
        for name, info in methods.items()
    ]
    if args.json:
        for one in told:
            print(json.dumps(one, ensure_ascii=False))
        return
    width = max(len(name) for name in methods)
    indent = " " * (width + 2)
    for one in told:
        print(f"{one['name']:<{width}}  {one['formula']}")
        print(f"{indent}{one['parameters']:,} trained at length {one['length']}, {args.backbone}")
        print(f"{indent}{one['cost']}{'; kept folded' if one['folds'] else ''}")
        print(f"{indent}{one['paper']}")


def _recipes() -> Lines:
    recipes = importlib.import_module("jaxprompt.recipes")
    return {name: recipes.describe(name).removeprefix(f"{name}: ") for name in recipes.RECIPES}


def _backbones() -> Lines:
    return importlib.import_module("jaxprompt.t5.backbones").list_backbones()


_LISTS: dict[str, Callable[[], Lines]] = {
    "backbones": _backbones,
    "recipes": _recipes,
    "tasks": _tasks,
}
