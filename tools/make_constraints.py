"""Writes constraints.txt anew: what a clean environment gets today, below and from Python 3.12.

python tools/make_constraints.py python3.11 python3.13

The first interpreter stands for Python 3.11, the second for everything newer.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
HEADER = """\
# Versions that are tested together; `make` installs with them. The package's own bounds are in
# pyproject.toml. Made by tools/make_constraints.py.
"""


def freeze(python: str) -> dict[str, str]:
    """Package -> version, in a clean environment with jaxprompt and its extras for developers."""
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run([python, "-m", "venv", directory], check=True)
        pip = [f"{directory}/bin/python", "-m", "pip", "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", f"{ROOT}[plots,dev]"], check=True)
        command = [*pip, "freeze", "--exclude", "jaxprompt"]
        lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    pairs = (line.partition("==") for line in lines.splitlines())
    return {name: version for name, equals, version in pairs if equals}


def merge(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """Constraint lines, with markers where the two sides differ."""
    lines = []
    for name in sorted({*old, *new}, key=str.lower):
        if name in old and name in new and old[name] != new[name]:
            lines.append(f'{name}=={old[name]}; python_version < "3.12"')
            lines.append(f'{name}=={new[name]}; python_version >= "3.12"')
        else:
            lines.append(f"{name}=={old.get(name) or new[name]}")
    return lines


def main() -> None:
    """Freezes both sides and writes the file."""
    old, new = (freeze(python) for python in sys.argv[1:3])
    (ROOT / "constraints.txt").write_text(HEADER + "\n".join(merge(old, new)) + "\n", "utf-8")


if __name__ == "__main__":
    main()
