"""Prompts of Hugging Face PEFT come in, answer as they did, and go out again byte for byte."""

import dataclasses
import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import peft_cases
import pytest
import tiny
from peft_cases import BACKBONES, CASES, DECODER_IDS, ENCODER_IDS, LENGTH, TASK, golden_answers

import jaxprompt as jp
from jaxprompt import cli, steps
from jaxprompt.artifact import BackboneIdentity, PromptArtifact, load_artifact, save_artifact
from jaxprompt.inference import put_on
from jaxprompt.t5.backbones import fingerprint
from jaxprompt.t5.search import Search
from jaxprompt.tensorfile import write_safetensors

FILES = ("adapter_config.json", "adapter_model.safetensors")
CLOSE = 1e-5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Backbones, and the adapters that PEFT wrote, each by its name."""
    root = tmp_path_factory.mktemp("peft")
    for name in BACKBONES:
        peft_cases.write_backbone(root, name)
    for label in CASES:
        peft_cases.write_golden(label, root / label)
    return root


def backbone_of(world: Path, label: str) -> Path:
    return world / CASES[label].backbone.replace(" ", "-")


def run(capsys: Any, *argv: object) -> tuple[int, str, str]:
    code = cli.main([str(word) for word in argv])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def task_of(label: str) -> list[str]:
    return ["--peft-task", str(TASK)] if label.startswith("multitask") else []


def logits(backbone: Path, prompt: PromptArtifact) -> np.ndarray:
    return np.asarray(jp.logits(jp.load_backbone(str(backbone)), prompt, ENCODER_IDS, DECODER_IDS))


@pytest.mark.filterwarnings("default:.*PEFT's forward also puts")
@pytest.mark.parametrize("label", CASES)
def test_it_answers_as_in_peft_and_goes_out_as_it_came(
    label: str, world: Path, tmp_path: Path, capsys: Any
):
    backbone, prompt, out = backbone_of(world, label), tmp_path / "prompt", tmp_path / "out"
    code, told, err = run(
        capsys, "import", world / label, prompt, "--backbone", backbone, *task_of(label)
    )
    assert code == 0 and f"{LENGTH} slots, of {backbone}" in told
    assert ("generate does not" in err) == (label == "multitask")
    imported = load_artifact(prompt)
    assert imported.backbone.fingerprint == fingerprint(backbone)
    want, got = golden_answers(label), logits(backbone, imported)
    assert np.abs(got[:, 0] - want["first"]).max() <= CLOSE
    if label != "multitask":  # whose forward is not what its generate does
        assert np.abs(got - want["forward"]).max() <= CLOSE
    assert np.abs(got - np.asarray(logits(backbone, None))).max() > 0.1
    code, told, err = run(capsys, "export", prompt, out, "--format", "peft", "--json")
    assert (code, err) == (0, "") and json.loads(told)["files"] == [*FILES, "README.md"]
    for name in FILES:
        assert (out / name).read_bytes() == (world / label / name).read_bytes(), name


def test_python_takes_a_peft_directory_as_it_is(world: Path):
    label = "prefix, two layers"
    prompt = jp.load_prompt(str(world / label))
    got = logits(backbone_of(world, label), prompt)
    np.testing.assert_allclose(got, golden_answers(label)["forward"], atol=CLOSE)


def test_a_prefix_generates_what_it_generates_in_peft(world: Path):
    """Greedy, with a cache."""
    label = "prefix, three layers"
    loaded = jp.load_backbone(str(backbone_of(world, label)))
    config = dataclasses.replace(loaded.config, eos_id=-1)
    loaded = dataclasses.replace(loaded, config=config)
    prompted = put_on(loaded, jp.load_prompt(str(world / label)))
    examples = [tiny.Example(ids[ids > 0].tolist(), [3]) for ids in ENCODER_IDS]
    batch = tiny.make_batch([[example] for example in examples], ENCODER_IDS.shape[1], 1, 1)
    program = jax.jit(steps.generate, static_argnums=0)
    rules = Search(max_new_tokens=peft_cases.NEW).rules
    trees = (prompted.graphdef, prompted.trained, prompted.frozen)
    got = np.asarray(program(*trees, batch, rules=rules).ids_BT)
    np.testing.assert_array_equal(got, golden_answers(label)["ids"])
    assert len(np.unique(got)) > 3, "a model that says one thing shows nothing"


def test_a_prompt_in_a_file_of_torch(world: Path, tmp_path: Path, capsys: Any):
    """Legacy `adapter_model.bin`, read without unpickling; what goes out is safetensors."""
    torch = pytest.importorskip("torch")
    label = "multitask, encoder alone"
    source = shutil.copytree(world / label, tmp_path / "legacy")
    kept = load_imported(world, label, tmp_path / "first", capsys).kept
    tensors = {name: torch.tensor(np.array(array)) for name, array in kept.items()}
    torch.save(tensors, source / "adapter_model.bin")
    (source / FILES[1]).unlink()
    options = ("--backbone", backbone_of(world, label), "--peft-task", TASK)
    assert run(capsys, "import", source, tmp_path / "p", *options)[0] == 0
    assert run(capsys, "export", tmp_path / "p", tmp_path / "out", "--format", "peft")[0] == 0
    for name in FILES:
        assert (tmp_path / "out" / name).read_bytes() == (world / label / name).read_bytes()


def load_imported(world: Path, label: str, out: Path, capsys: Any) -> PromptArtifact:
    options = ("--backbone", backbone_of(world, label), *task_of(label))
    assert run(capsys, "import", world / label, out, *options)[0] == 0
    return load_artifact(out)


def own(world: Path, kind: str = "soft", backbone: str = "three layers") -> PromptArtifact:
    """A prompt that did not come from PEFT."""
    sizes, place = BACKBONES[backbone], world / backbone.replace(" ", "-")
    draw = np.random.default_rng(2)
    if kind == "soft":
        method: dict[str, Any] = {"name": "soft", "length": LENGTH}
        shapes = {"prompt": (LENGTH, sizes.d_model)}
    else:
        method = {
            "name": "p-tuning-v2", "length": LENGTH, "places": ["decoder"], "before_text": True
        }  # fmt: skip
        shape = (sizes.num_decoder_layers, LENGTH, sizes.num_heads, sizes.d_kv)
        shapes = {"decoder_self_keys": shape, "decoder_self_values": shape}
    return PromptArtifact(
        method=method,
        layout="{prompt}{input}",
        task={},
        backbone=BackboneIdentity(str(place), fingerprint(place), sizes.d_model, sizes.vocab_size),
        values={name: draw.normal(size=size).astype(np.float32) for name, size in shapes.items()},
    )


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_our_prompt_comes_back_the_same(kind: str, world: Path, tmp_path: Path, capsys: Any):
    """PEFT's config holds every key; what is read again holds the same values."""
    ours = own(world, kind)
    save_artifact(tmp_path / "p", ours)
    assert run(capsys, "export", tmp_path / "p", tmp_path / "out", "--format", "peft")[0] == 0
    config = json.loads((tmp_path / "out" / FILES[0]).read_text())
    like = "prompt tuning" if kind == "soft" else "prefix, three layers"
    assert set(config) == set(json.loads((world / like / FILES[0]).read_text()))
    again = jp.load_prompt(str(tmp_path / "out"))
    assert dict(again.method) == {**ours.method}
    for name, value in ours.values.items():
        np.testing.assert_array_equal(again.values[name], value)
    assert again.backbone.name == ours.backbone.name


@pytest.mark.parametrize("kind", ["soft", "prefix"])
def test_peft_answers_with_our_prompt_as_we_do(kind: str, world: Path, tmp_path: Path, capsys: Any):
    """And saves what it has loaded as the same bytes."""
    pytest.importorskip("peft")
    ours = own(world, kind)
    save_artifact(tmp_path / "p", ours)
    assert run(capsys, "export", tmp_path / "p", tmp_path / "out", "--format", "peft")[0] == 0
    backbone = Path(ours.backbone.name)
    want, again = peft_cases.ask(tmp_path / "out", backbone)
    got = logits(backbone, ours)
    assert np.abs(got - want["forward"]).max() <= CLOSE
    assert np.abs(got[:, 0] - want["first"]).max() <= CLOSE
    for name in FILES:
        assert again[name] == (tmp_path / "out" / name).read_bytes(), name


def test_peft_still_does_what_the_stored_answers_say(world: Path, tmp_path: Path):
    """The golden arrays against the PEFT that is installed."""
    pytest.importorskip("peft")
    for label in ("prompt tuning", "multitask", "prefix, two layers", "prefix, three layers"):
        adapter = tmp_path / label
        peft_cases.write_golden(label, adapter)
        answers, again = peft_cases.ask(adapter, backbone_of(world, label))
        for name, answer in answers.items():
            np.testing.assert_allclose(
                answer, golden_answers(label)[name], atol=CLOSE, err_msg=f"{label} {name}"
            )
        for name in FILES:
            assert again[name] == (adapter / name).read_bytes(), (label, name)


def test_slots_as_an_array(world: Path, tmp_path: Path, capsys: Any):
    ours = own(world)
    save_artifact(tmp_path / "p", ours)
    out = tmp_path / "slots.npy"
    code, told, _ = run(capsys, "export", tmp_path / "p", out, "--format", "numpy")
    assert code == 0 and told == f"{out}: slots.npy\n"
    np.testing.assert_array_equal(np.load(out), ours.values["prompt"])
    assert jp.load_prompt(str(out)).layout == "{prompt}{input}"


def edited(**changes: Any) -> Callable[[Path], Path]:
    """Another value in the config; None = the key is gone."""

    def edit(source: Path) -> Path:
        path = source / FILES[0]
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
        return source

    return edit


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], Path]:
    def edit(source: Path) -> Path:
        path = source / FILES[1]
        path.write_bytes(change(path.read_bytes()))
        return source

    return edit


def tensors(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def edit(source: Path) -> Path:
        write_safetensors(source / FILES[1], arrays)
        return source

    return edit


class Hostile:
    """Calls something when it is unpickled."""

    def __reduce__(self) -> tuple:
        return (print, ("unpickled",))


def hostile(source: Path) -> Path:
    (source / FILES[1]).unlink()
    (source / "adapter_model.bin").write_bytes(pickle.dumps({"prompt_embeddings": Hostile()}))
    return source


def without_weights(source: Path) -> Path:
    (source / FILES[1]).unlink()
    return source


ROWS = np.ones((2 * LENGTH, 12), np.float32)
PROMPT, PREFIX, MULTITASK = "prompt tuning", "prefix, three layers", "multitask, encoder alone"
WRONG: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "lora": (PROMPT, edited(peft_type="LORA"), "peft_type LORA is no prompt that can be imported"),
    "cpt": (PROMPT, edited(peft_type="CPT"), "peft_type CPT is no prompt"),
    "no type": (PROMPT, edited(peft_type=None), "it names no peft_type"),
    "a decoder-only model": (
        PROMPT, edited(task_type="CAUSAL_LM"), "task_type is CAUSAL_LM, a prompt of a T5 has"
    ),
    "no JSON": (
        PROMPT,
        lambda source: (source / FILES[0]).write_text("{") and source,
        "adapter_config.json is damaged: not JSON",
    ),
    "no length": (PROMPT, edited(num_virtual_tokens=None), "num_virtual_tokens is None, not a"),
    "another length": (
        PROMPT, edited(num_virtual_tokens=5), "prompt_embeddings has shape (8, 12), adapter_config"
    ),
    "a damaged header": (
        PROMPT, weights(lambda b: b[:9] + b"}" + b[10:]), "damaged safetensors header"
    ),
    "a header without end": (
        PROMPT, weights(lambda b: struct.pack("<Q", 1 << 40) + b[8:]), "or it was cut short"
    ),
    "cut short": (PROMPT, weights(lambda b: b[:-8]), "does not fill bytes 0 to 384 of 376"),
    "no weights": (PROMPT, without_weights, "has no adapter_model.safetensors, nor adapter_model"),
    "a pickle that calls": (PROMPT, hostile, "refused to load builtins.print"),
    "another key": (PROMPT, tensors(embeddings=ROWS), "holds no prompt_embeddings, only embedd"),
    "half a multitask prompt": (
        MULTITASK, tensors(prompt_embeddings=ROWS[:LENGTH]), "holds no prefix_task_cols"
    ),
    "a tuned module": (
        PROMPT,
        tensors(prompt_embeddings=ROWS, **{"base_model.shared.weight": ROWS}),
        "also holds base_model.shared.weight: weights of the backbone",
    ),
    "not finite": (PROMPT, tensors(prompt_embeddings=ROWS * np.inf), "not finite"),
    "integers": (PROMPT, tensors(prompt_embeddings=ROWS.astype(int)), "is int64, a prompt is"),
    "another width": (
        PROMPT,
        lambda source: tensors(prompt_embeddings=ROWS[:, :9])(edited(token_dim=9)(source)),
        "has d_model 9, backbone",
    ),
    "a prefix of more layers": (
        PREFIX,
        edited(num_layers=4),
        "prompt_embeddings has shape (4, 90), adapter_config.json makes it [4, 120]",
    ),
    "a prefix of other heads": (
        PREFIX,
        edited(num_attention_heads=5),
        "keys for 3 layers with 5 heads of size 3, the backbone's decoder has 3 with 3 of 5",
    ),
    "a prefix of fewer layers": (
        PREFIX,
        lambda source: tensors(prompt_embeddings=np.ones((LENGTH, 60), np.float32))(
            edited(num_layers=2)(source)
        ),
        "keys for 2 layers with 3 heads of size 5, the backbone's decoder has 3",
    ),
    "a prefix that PEFT cannot run": (
        PREFIX, edited(num_transformer_submodules=1), "PEFT itself cannot run a prefix on a T5"
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(case: str, world: Path, tmp_path: Path, capsys: Any):
    label, make, said = WRONG[case]
    source = make(shutil.copytree(world / label, tmp_path / "source"))
    options = ("--backbone", backbone_of(world, label), *task_of(label))
    code, out, err = run(capsys, "import", source, tmp_path / "out", *options)
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err, err
    assert "unpickled" not in out and not (tmp_path / "out").exists()


def test_the_task_of_a_multitask_prompt_is_asked_for(world: Path, tmp_path: Path, capsys: Any):
    options = ("--backbone", backbone_of(world, MULTITASK))
    code, _, err = run(capsys, "import", world / MULTITASK, tmp_path / "out", *options)
    assert code == 2 and "prompts of several tasks: choose one of 0 to 2 with --peft-task" in err
    options = (*options, "--peft-task", 3)
    code, _, err = run(capsys, "import", world / MULTITASK, tmp_path / "out", *options)
    assert code == 2 and "has no task 3: choose one of 0 to 2" in err
    code, _, err = run(capsys, "import", world / PROMPT, tmp_path / "out", *options)
    assert code == 2 and "PROMPT_TUNING, which has one task; leave out --peft-task" in err


def test_unknown_keys_are_kept_and_adapters_in_folders_are_named(
    world: Path, tmp_path: Path, capsys: Any
):
    edited(of_a_later_version=[1])(shutil.copytree(world / PROMPT, tmp_path / "all" / "mine"))
    backbone = ("--backbone", backbone_of(world, PROMPT))
    code, _, err = run(capsys, "import", tmp_path / "all", tmp_path / "p", *backbone)
    assert code == 2 and "holds PEFT adapters in mine: name one of them" in err
    assert run(capsys, "import", tmp_path / "all" / "mine", tmp_path / "p", *backbone)[0] == 0
    assert run(capsys, "export", tmp_path / "p", tmp_path / "out", "--format", "peft")[0] == 0
    written = (tmp_path / "out" / FILES[0]).read_bytes()  # not indented: the text itself is kept
    assert written == (tmp_path / "all" / "mine" / FILES[0]).read_bytes()


def prefix_with(**method: Any) -> Callable[[Path], PromptArtifact]:
    def make(world: Path) -> PromptArtifact:
        ours = own(world, "prefix")
        return dataclasses.replace(ours, method={**ours.method, **method})

    return make


REFUSED: dict[str, tuple[Callable[[Path], PromptArtifact], str, str]] = {
    "an even number of layers": (
        lambda world: own(world, "prefix", "shallow decoder"),
        "peft",
        "PEFT gives layers 0 and 1 of a T5 decoder of 2 layers the same prefix",
    ),
    "other places": (prefix_with(places=["decoder", "cross"]), "peft", "also has places cross"),
    "no positions": (prefix_with(before_text=False), "peft", "method.before_text is false"),
    "a delta": (
        lambda world: dataclasses.replace(own(world), method={"name": "dept", "length": 4}),
        "peft",
        "cannot express a prompt of method dept: it adds to the input's embeddings",
    ),
    "slots behind": (
        lambda world: dataclasses.replace(own(world), layout="{input}{prompt}"),
        "peft",
        "PEFT puts all slots before the input; this prompt's layout is '{input}{prompt}'",
    ),
    "unknown backbone": (
        lambda world: dataclasses.replace(own(world), backbone=BackboneIdentity(d_model=12)),
        "peft",
        "name it with --backbone",
    ),
    "a lost backbone": (
        lambda world: dataclasses.replace(
            own(world), backbone=BackboneIdentity("gone/", d_model=12)
        ),
        "peft",
        "name the prompt's backbone with --backbone",
    ),
    "an array of a prefix": (
        lambda world: own(world, "prefix"), "numpy", "cannot say what a prompt of method p-tuning"
    ),
    "an array of slots behind": (
        lambda world: dataclasses.replace(own(world), layout="{input}{prompt}"),
        "numpy",
        "a bare array of slots stands before the input",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_expressed_is_refused(case: str, world: Path, tmp_path: Path, capsys: Any):
    make, form, said = REFUSED[case]
    save_artifact(tmp_path / "p", make(world))
    code, out, err = run(capsys, "export", tmp_path / "p", tmp_path / "out", "--format", form)
    assert (code, out) == (2, "") and err.count("\n") == 1 and said in err, err
    assert not (tmp_path / "out").exists()


DAMAGED: dict[str, tuple[str, str, Any]] = {
    "no config": (PROMPT, "config", None),
    "a list": (PROMPT, "config", []),
    "no JSON": (PROMPT, "config", "{"),
    "no dtypes": (PROMPT, "dtypes", None),
    "another dtype": (PROMPT, "dtypes", {"prompt_embeddings": "float1"}),
    "another format": (PROMPT, "format", "lora"),
    "another type": (PROMPT, "config.peft_type", "LORA"),
    "another length": (PROMPT, "config.num_virtual_tokens", 7),
    "another number of layers": (PREFIX, "config.num_layers", 4),
    "layers in words": (PREFIX, "config.num_layers", "three"),
}


def test_a_damaged_origin_is_one_sentence(world: Path, tmp_path: Path, capsys: Any):
    """What was kept of an adapter and changed by hand since; nothing is written."""
    for label in (PROMPT, PREFIX):
        backbone = ("--backbone", backbone_of(world, label))
        assert run(capsys, "import", world / label, tmp_path / label, *backbone)[0] == 0
    for case, (label, key, value) in DAMAGED.items():
        place = shutil.copytree(tmp_path / label, tmp_path / case) / "prompt_config.json"
        whole = json.loads(place.read_text())
        *path, last = ["origin", *key.split(".")]
        changed = whole
        for step in path:
            changed = changed[step]
        changed[last] = value
        if value is None:
            del changed[last]
        place.write_text(json.dumps(whole))
        options = (tmp_path / case, tmp_path / "out", "--format", "peft")
        code, out, err = run(capsys, "export", *options)
        assert (code, out) == (2, "") and err.count("\n") == 1, (case, err)
        assert "`origin` keeps of the PEFT adapter does not fit" in err, (case, err)
        assert not (tmp_path / "out").exists()


def test_nothing_but_an_adapter_is_written_over(world: Path, tmp_path: Path, capsys: Any):
    save_artifact(tmp_path / "p", own(world))
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    code, _, err = run(capsys, "export", tmp_path / "p", out, "--format", "peft")
    assert code == 2 and "it also holds notes" in err and len(list(out.iterdir())) == 1
    (out / "notes").unlink()
    for _ in range(2):
        assert run(capsys, "export", tmp_path / "p", out, "--format", "peft")[0] == 0
