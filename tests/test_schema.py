"""YAML to dataclasses and back: places in errors, types, overrides, and that nothing is lost."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprompt import schema
from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float | None = None
    steps: int = 10
    words: tuple[str, ...] = ()
    labels: dict[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self):
        if self.steps < 0:
            raise UserError(f"inner.steps is {self.steps}, it cannot be negative")


@dataclasses.dataclass(frozen=True)
class Outer:
    name: str
    mode: Literal["prompt", "model"] = "prompt"
    flag: bool = False
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    maybe: Inner | None = None
    pair: tuple[int, float] = (1, 2.0)
    either: str | tuple[str, ...] = ""


def read(tmp_path: Path, text: str, *overrides: str) -> Outer:
    path = tmp_path / "run.yaml"
    path.write_text(text, encoding="utf-8")
    mapping, where = schema.read_yaml(path)
    mapping, where = schema.apply_overrides(mapping, where, overrides)
    return schema.from_mapping(Outer, mapping, where)


def error(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text, *overrides)
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert "\n" not in message
    return message


def test_nested_values_get_their_types(tmp_path):
    text = """
name: x
mode: model
flag: true
inner: {rate: 1e-3, steps: 1e2, words: [no, on, 'true'], labels: {0: negative, true: positive}}
parts:
  - steps: 1
  - rate: 3
maybe: null
pair: [3, 4]
"""
    config = read(tmp_path, text)
    assert config.inner == Inner(
        0.001, 100, ("no", "on", "true"), {"0": "negative", "true": "positive"}
    )
    assert config.parts == (Inner(steps=1), Inner(rate=3.0))
    assert (config.mode, config.flag, config.maybe, config.pair) == ("model", True, None, (3, 4.0))
    assert isinstance(config.inner.steps, int) and isinstance(config.parts[1].rate, float)


def test_a_section_without_keys_is_its_defaults(tmp_path):
    assert read(tmp_path, "name: x\ninner:\n  # steps: 3\n").inner == Inner()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("name: x\niner: {}", "run.yaml:2: unknown key 'iner'; did you mean 'inner'?"),
        (
            "name: x\ninner:\n  step: 3",
            "run.yaml:3: unknown key 'inner.step'; did you mean 'inner.steps'?",
        ),
        ("name: x\nsteps: 3", "run.yaml:2: unknown key 'steps'; did you mean 'inner.steps'"),
        ("name: x\nzzz: 3", "run.yaml:2: unknown key 'zzz'; valid here: name, mode, flag, inner,"),
        ("mode: model", "run.yaml: 'name' is missing; it must be text"),
        ("name: 3", "run.yaml:1: 'name' must be text, got 3"),
        ("name:", "run.yaml:1: 'name' must be text, got nothing"),
        ("name: x\nflag: yes", "run.yaml:2: 'flag' must be true or false, got the text 'yes'"),
        ("name: x\nflag: [on]", "run.yaml:2: 'flag' must be true or false, got"),
        ("name: x\nflag: 1", "run.yaml:2: 'flag' must be true or false, got 1"),
        (
            "name: x\ninner:\n  steps: many",
            "run.yaml:3: 'inner.steps' must be an integer, got the text",
        ),
        (
            "name: x\ninner:\n  steps: true",
            "run.yaml:3: 'inner.steps' must be an integer, got true",
        ),
        ("name: x\ninner:\n  steps: 1.5", "run.yaml:3: 'inner.steps' must be an integer, got 1.5"),
        (
            "name: x\ninner:\n  steps: 1e999",
            "run.yaml:3: 'inner.steps' must be an integer, got inf",
        ),
        (
            "name: x\ninner:\n  rate: .nan",
            "run.yaml:3: 'inner.rate' must be a number, got the text",
        ),
        ("name: x\ninner: 3", "run.yaml:2: 'inner' must be a mapping (key: value), got 3"),
        (
            "name: x\nmode: modle",
            "must be one of prompt, model, got the text 'modle'; did you mean 'model'?",
        ),
        ("name: x\nparts: {steps: 1}", "run.yaml:2: 'parts' must be a list ([...]) of a mapping"),
        (
            "name: x\nparts:\n  - steps: 1\n  - stps: 2",
            "run.yaml:4: unknown key 'parts.1.stps'; did you mean",
        ),
        (
            "name: x\npair: [1]",
            "run.yaml:2: 'pair' must be a list of 2: an integer, a number, got a list of 1",
        ),
        ("name: x\ninner: {words: [a, 1]}", "run.yaml:2: 'inner.words.1' must be text, got 1"),
        (
            "name: x\ninner:\n  rate: 1\n  steps: -3",
            "run.yaml:4: inner.steps is -3, it cannot be negative",
        ),
        ("name: x\nname: y", "run.yaml:2: key 'name' is given twice"),
        ("name: [x", "run.yaml:1: not valid YAML"),
        ("name: x\n\tmode: model", "run.yaml:2: not valid YAML"),
        ("- name", "run.yaml: must hold `key: value` lines, not a list of 1"),
        ("? [a]\n: b", "run.yaml:1: a key must be a word"),
        ("name: !!python/object:os.system x", "run.yaml:1: not valid YAML"),
        ("a: &a [*a]", "run.yaml: not valid YAML"),
        ("name: \x01", "run.yaml: not valid YAML"),
    ],
)
def test_errors_name_the_place_and_what_would_be_right(tmp_path, text, expected):
    assert expected in error(tmp_path, text)


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"none.yaml: cannot be read \(No such file"):
        schema.read_yaml(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(UserError, match=r"latin.yaml: not a UTF-8 text file"):
        schema.read_yaml(tmp_path / "latin.yaml")


@pytest.mark.parametrize(
    ("override", "attribute", "value"),
    [
        ("name=5", "name", "5"),
        ("name=", "name", ""),
        ("name=true", "name", "true"),
        ("name='quoted'", "name", "quoted"),
        ("name={text}: {b", "name", "{text}: {b"),
        ("name={text}", "name", "{text}"),
        ("name=a=b", "name", "a=b"),
        ("flag=true", "flag", True),
        ("mode=model", "mode", "model"),
        ("pair=[5, 6]", "pair", (5, 6.0)),
        ("inner={steps: 3}", "inner", Inner(steps=3)),
        ("inner.rate=2e-4", "inner", Inner(rate=2e-4, steps=7)),
        ("inner.rate=null", "inner", Inner(steps=7)),
        ("inner.labels.1=2", "inner", Inner(steps=7, labels={"1": "2"})),
        ("parts.1.steps=9", "parts", (Inner(steps=1), Inner(steps=9))),
        ("maybe.steps=9", "maybe", Inner(steps=9)),
        ("either=[a, b]", "either", ("a", "b")),
        ("either=3", "either", "3"),
    ],
)
def test_overrides_are_yaml_and_text_where_text_is_wanted(tmp_path, override, attribute, value):
    text = "name: x\ninner: {steps: 7}\nparts: [{steps: 1}, {steps: 2}]"
    assert getattr(read(tmp_path, text, override), attribute) == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps", "override 'steps' is not of the form key.sub=value"),
        ("=3", "override '=3' is not of the form key.sub=value"),
        ("iner.steps=3", "override 'iner.steps=3': unknown key 'iner'; did you mean 'inner'?"),
        (
            "inner.stps=3",
            "override 'inner.stps=3': unknown key 'inner.stps'; did you mean 'inner.steps'?",
        ),
        (
            "inner.steps=x",
            "override 'inner.steps=x': 'inner.steps' must be an integer, got the text 'x'",
        ),
        ("inner.steps=-1", "override 'inner.steps=-1': inner.steps is -1, it cannot be negative"),
        ("name.sub=3", "override 'name.sub=3': 'name' is the text 'x', not a mapping"),
        (
            "parts.2.steps=3",
            "override 'parts.2.steps=3': 'parts' is a list of 1, so '2' must be a number",
        ),
        ("parts.0.stps=3", "override 'parts.0.stps=3': unknown key 'parts.0.stps'; did you mean"),
        (
            "mode=modle",
            "override 'mode=modle': 'mode' must be one of prompt, model, got the text 'modle'",
        ),
    ],
)
def test_errors_of_overrides_name_the_override(tmp_path, override, expected):
    assert expected in error(tmp_path, "name: x\nparts: [{steps: 1}]", override)


def test_later_overrides_win_and_the_mapping_given_stays(tmp_path):
    mapping = {"name": "x", "inner": {"steps": 1}}
    where = schema.Where("here")
    changed, _ = schema.apply_overrides(mapping, where, ["inner.steps=2", "inner.steps=3"])
    assert schema.from_mapping(Outer, changed, where).inner.steps == 3
    assert mapping == {"name": "x", "inner": {"steps": 1}}


def test_from_mapping_takes_python_values():
    mapping = {"name": "x", "inner": Inner(steps=2), "parts": [{"labels": {0: "no"}}]}
    config = schema.from_mapping(Outer, mapping, "here")
    assert config.inner == Inner(steps=2)
    assert config.parts == (Inner(labels={"0": "no"}),)


def test_dump_is_complete_and_in_order():
    text = schema.dump(Outer("x"))
    keys = [line.split(":")[0] for line in text.splitlines() if line[0] not in " -"]
    assert keys == [field.name for field in dataclasses.fields(Outer)]
    assert "rate: null" in text and "steps: 10" in text


words = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["no", "1e-3", "1_0", "0o7", "null", "~", "", "1:30", "2020-01-01", "=", "<<"]),
)
inners = st.builds(
    Inner,
    rate=st.none() | st.floats(allow_nan=False, allow_infinity=False),
    steps=st.integers(0, 10**12),
    words=st.lists(words, max_size=3).map(tuple),
    labels=st.dictionaries(words, words, max_size=3),
)
outers = st.builds(
    Outer,
    name=words,
    mode=st.sampled_from(["prompt", "model"]),
    flag=st.booleans(),
    inner=inners,
    parts=st.lists(inners, max_size=2).map(tuple),
    maybe=st.none() | inners,
    pair=st.tuples(st.integers(-5, 5), st.floats(-1, 1)),
    either=words | st.lists(words, max_size=2).map(tuple),
)


@given(outers)
def test_what_dump_writes_reads_back_as_the_same(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("dump") / "config.yaml"
    path.write_text(schema.dump(config), encoding="utf-8")
    mapping, where = schema.read_yaml(path)
    assert schema.from_mapping(Outer, mapping, where) == config


def test_floats_survive_to_the_last_bit(tmp_path):
    path = tmp_path / "config.yaml"
    for rate in (0.1 + 0.2, 1e-300, math.pi * 1e20, 5e-324):
        path.write_text(schema.dump(Outer("x", inner=Inner(rate=rate))), encoding="utf-8")
        assert schema.from_mapping(Outer, *schema.read_yaml(path)).inner.rate == rate
