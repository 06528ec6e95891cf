"""The shape of the house: floors, doors to other packages, what is never used or imported."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "jaxprompt"
FILES = sorted(PACKAGE.rglob("*.py"))

# docs/design.md draws this, ground floor first. A file of a folder stands on the folder's floor.
HOUSE = [
    ["typing"],
    [
        *("allocator", "arraystore", "files", "hosts", "identity", "logging", "losses"),
        *("metrics", "plots", "quantize", "recipes", "schema", "sharding"),
        *("tables", "tensorfile", "text_match", "trees"),
    ],
    ["distil", "prompts", "regularize", "t5"],
    ["data", "model"],
    ["artifact", "backbone", "checkpoint", "interop", "optim"],
    ["steps"],
    [
        "answerer",
        "borrowed",
        "compare_config",
        "compiled",
        "config",
        "generation",
        "inference",
        "keeping",
        "loop",
        "members",
        "notes",
        "phases",
        "planning",
        "pruning",
        "scale_config",
        "scale_points",
        "step_metrics",
        "sweep_config",
        "trainee",
    ],
    [
        "api",
        "arguments",
        "compare",
        "convert",
        "evaluate",
        "exporting",
        "importing",
        "inspection",
        "joining",
        "listing",
        "measuring",
        "plan",
        "predict",
        "pretrain",
        "prompt_arguments",
        "scale",
        "serve",
        "sweep",
        "train",
        "training",
        "transfer",
    ],
    ["cli"],
]
FLOORS = {room: floor for floor, rooms in enumerate(HOUSE) for room in rooms}
# Neighbours on one floor that may see each other, and rooms that may not although floors allow it.
NEIGHBOURS = {
    ("arraystore", "tensorfile"),
    ("backbone", "artifact"),
    ("interop", "artifact"),
    ("answerer", "generation"),
    ("config", "loop"),
    ("inference", "generation"),
    ("metrics", "text_match"),
    ("loop", "members"),
    ("loop", "step_metrics"),
    ("step_metrics", "members"),
    ("sweep", "training"),
    ("compare", "measuring"),
    ("compare", "sweep"),
    ("compare", "training"),
    ("compare_config", "config"),
    ("compare_config", "sweep_config"),
    ("planning", "compiled"),
    ("prompt_arguments", "arguments"),
    ("planning", "config"),
    ("planning", "trainee"),
    ("measuring", "evaluate"),
    ("phases", "config"),
    ("pruning", "config"),
    ("pruning", "trainee"),
    ("scale", "measuring"),
    ("scale", "sweep"),
    ("scale_config", "config"),
    ("scale_config", "sweep_config"),
    ("sweep_config", "config"),
    ("borrowed", "config"),
    ("keeping", "config"),
    ("keeping", "trainee"),
    ("notes", "members"),
    ("notes", "trainee"),
    ("pruning", "borrowed"),
    ("trainee", "borrowed"),
    ("trainee", "config"),
    ("training", "evaluate"),
    ("train", "sweep"),
    ("train", "training"),
}
WALLS = {("prompts", "t5"), ("data", "t5"), ("data", "prompts")}

# Packages with one door.
DOORS = {
    "orbax": {"checkpoint.py"},
    "transformers": {"data/tokenizer.py"},
    "safetensors": {"tensorfile.py"},
    "tensorstore": {"arraystore.py"},
    "qwix": {"quantize.py"},
}
FORBIDDEN = ("nnx.jit", "nnx.Optimizer", "nnx.DiffState", "jax._src", "pickle")
NEVER_IMPORTED = ("tensorflow", "torch")


def _name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def _room(module: str) -> str:
    """`jaxprompt.t5.config` -> `t5`."""
    return module.split(".")[1]


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules imported anywhere in a file, in functions too; `from a import b` gives a and a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _rooms_seen(tree: ast.AST) -> set[str]:
    modules = [name for name in _imports(tree) if name.startswith("jaxprompt.")]
    return {_room(name) for name in modules if _room(name) in FLOORS}


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


ROOM_FILES = [path for path in FILES if not _name(path).startswith("__")]


def test_there_are_files_to_check():
    assert len(ROOM_FILES) > 20


@pytest.mark.parametrize("path", ROOM_FILES, ids=_name)
def test_a_file_imports_only_from_floors_below(path: Path):
    room = _name(path).split("/")[0].removesuffix(".py")
    assert room in FLOORS, f"give {room} a floor, here and in docs/design.md"
    for seen in _rooms_seen(_tree(path)) - {room}:
        below = FLOORS[seen] < FLOORS[room] or (room, seen) in NEIGHBOURS
        assert below, f"{room} (floor {FLOORS[room]}) imports {seen} (floor {FLOORS[seen]})"
        assert (room, seen) not in WALLS, f"{room} imports {seen}"


def test_the_package_itself_imports_no_room_before_it_is_asked():
    tree = _tree(PACKAGE / "__init__.py")
    top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not _rooms_seen(ast.Module(top, []))


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_packages_with_one_door_are_used_behind_it(path: Path):
    for module in _imports(_tree(path)):
        doors = DOORS.get(module.split(".")[0])
        assert doors is None or _name(path) in doors, f"{module} belongs in {doors}"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_forbidden_names(path: Path):
    tree = _tree(path)
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    for name in {*used, *_imports(tree)}:
        spelled = name.removeprefix("flax.")
        for forbidden in FORBIDDEN:
            assert not f"{spelled}.".startswith(f"{forbidden}."), f"{name} is not used here"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_neither_tensorflow_nor_torch_is_imported_by_name(path: Path):
    for module in _imports(_tree(path)):
        assert module.split(".")[0] not in NEVER_IMPORTED


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_are_rooms_not_drawers(path: Path):
    text = path.read_text(encoding="utf-8")
    assert path.stem not in ("utils", "util", "helpers", "misc", "common")
    assert not text or ast.get_docstring(ast.parse(text)), "a module docstring says what it is for"
    assert "TODO" not in text
    assert text.count("\n") <= 400, "over 400 lines: is it still one room?"


def _modules_after(code: str) -> set[str]:
    """Top-level packages loaded in a fresh interpreter after running `code`."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in json.loads(done.stdout.splitlines()[-1])}


HEAVY = {"jax", "flax", "numpy", "transformers", "tensorflow", "torch", "orbax", "grain", "yaml"}


@pytest.mark.parametrize(
    "code",
    [
        "import jaxprompt; jaxprompt.__version__; dir(jaxprompt)",
        "from jaxprompt.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass",
        "from jaxprompt.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass",
    ],
    ids=["import", "help", "help of a command"],
)
def test_importing_and_help_load_nothing_heavy(code: str):
    assert not _modules_after(code) & HEAVY


def test_all_rooms_together_load_neither_tensorflow_nor_torch():
    modules = [
        ".".join(("jaxprompt", *path.relative_to(PACKAGE).with_suffix("").parts))
        for path in ROOM_FILES
        if path.name != "__init__.py"
    ]
    loaded = _modules_after("import importlib\n" + "\n".join(
        f"importlib.import_module({module!r})" for module in modules
    ))  # fmt: skip
    assert "jax" in loaded
    assert not loaded & set(NEVER_IMPORTED)


def test_public_names_lead_somewhere():
    rooms = _modules_after(
        "import jaxprompt\nfor name in jaxprompt.__all__: getattr(jaxprompt, name)"
    )
    assert "jaxprompt" in rooms


def test_train_stays_the_function_after_its_room_is_imported():
    code = "import jaxprompt.train, jaxprompt\nassert callable(jaxprompt.train), jaxprompt.train"
    assert "jaxprompt" in _modules_after(code)
