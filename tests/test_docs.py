"""The documents: links lead somewhere, commands are commands and their configs read."""

import re
import shlex
from pathlib import Path

import pytest

from jaxprompt import cli
from jaxprompt.compare_config import load_comparison
from jaxprompt.phases import load_phases
from jaxprompt.scale_config import load_scale
from jaxprompt.sweep_config import load_sweep

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]
)


READ = {
    "train": load_sweep,
    "compare": load_comparison,
    "pretrain": load_phases,
    "scale": load_scale,
}
"""What reads the config that a command names, with the keys that it sets."""


def by_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=by_name)
def test_links_lead_somewhere(document: Path):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), f"{target} is linked and not there"


def commands(document: Path) -> list[list[str]]:
    """The `jaxprompt` commands of a document's code blocks, as words."""
    blocks = re.findall(r"```\w*\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    found = []
    for block in blocks:
        words = shlex.split(block.replace("\\\n", " ").replace("\n", " ; "), comments=False)
        line: list[str] = []
        for word in [*words, ";"]:
            if word in (";", "|", "&&"):
                found += [line[1:]] if line[:1] == ["jaxprompt"] else []
                line = []
            else:
                line.append(word)
    return found


# docs/design.md draws commands with what is optional in brackets
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "design.md"], ids=by_name)
def test_commands_are_commands(document: Path):
    for words in commands(document):
        shown = words[: words.index("#")] if "#" in words else words
        args = cli._parse(cli._parser(), [word for word in shown if word != "..."])
        if args.command in READ:
            # a line's end inside quotes is not the end of a command
            overrides = [one.replace(" ; ", "\n") for one in args.overrides]
            only = [args.only] if getattr(args, "only", None) else []
            READ[args.command](args.config, overrides, *only)


def test_the_readme_shows_commands():
    assert len(commands(ROOT / "README.md")) >= 5
