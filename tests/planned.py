"""`jaxprompt plan` as its tests call it."""

import json
from typing import Any

import pytest

from jaxprompt import cli


def plan(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `jaxprompt plan ARGV`."""
    code = cli.main(["plan", *map(str, argv)])
    said = capsys.readouterr()
    return code, said.out, said.err


def planned(capsys: pytest.CaptureFixture[str], *argv: object) -> list[dict[str, Any]]:
    """The JSON objects of a plan that comes to an end."""
    code, out, _ = plan(capsys, *argv, "--json")
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]
