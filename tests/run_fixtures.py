"""A tiny random backbone on disk, a tiny task with its files, and configs of runs over them."""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax.experimental.compilation_cache import compilation_cache
from tiny import make_params
from tiny_tokenizer import write_tokenizer

from jaxprompt import trees
from jaxprompt.artifact import BackboneIdentity, PromptArtifact, save_artifact
from jaxprompt.checkpoint import Checkpoints
from jaxprompt.config import RunConfig, load_config
from jaxprompt.t5.backbones import fingerprint
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.weights import save_hf

CONFIG = T5Config(
    vocab_size=136, d_model=16, d_kv=5, d_ff=24, num_layers=1, num_decoder_layers=1, num_heads=3,
    relative_attention_num_buckets=8, relative_attention_max_distance=16,
)  # fmt: skip
GOOD, BAD, REST = "good great", "bad terrible", "a about book clothing film food in of the this was"
# How much of what the prompt says reaches the logits: a random T5 as it is hardly listens.
_LOUDNESS = {
    "encoder_decoder_attention/out": 3, "encoder_decoder_attention/value": 3, "logits_dense": 2,
    "self_attention/out": 0.3, "encoder/layers/attention/out": 0.3, "mlp/wo": 0.3,
}  # fmt: skip
_COMPILER = {
    "jax_compilation_cache_dir": "",
    "jax_persistent_cache_min_compile_time_secs": 0.0,
    "jax_persistent_cache_min_entry_size_bytes": -1,
    "jax_disable_most_optimizations": True,  # of the compiler, which takes most of the time
}


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Compiles fast, and keeps programs on disk for all runs and processes of a session."""
    place = tmp_path_factory.getbasetemp() / "compiled"
    before = {name: jax.config.values[name] for name in _COMPILER}
    for name, value in {**_COMPILER, "jax_compilation_cache_dir": str(place)}.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield place
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@dataclasses.dataclass(frozen=True)
class World:
    """What runs read: a directory with a backbone, rows and `run.yaml`."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "run.yaml"

    def load(self, output_dir: Path, *overrides: str) -> RunConfig:
        """The config of a run into `output_dir`."""
        return load_config(self.config, [f"output_dir={output_dir}", *overrides])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Files for runs of 20 steps with 4 slots."""
    root = tmp_path_factory.mktemp("world")
    return make_world(root, root)


def make_world(root: Path, seen_from: Path) -> World:
    """Writes `backbone/`, `train.jsonl`, `validation.jsonl` and `run.yaml` into `root`.

    Args:
      seen_from: where the config's paths begin.
    """
    write_backbone(root / "backbone")
    write_rows(root / "train.jsonl", review_rows(64, seed=1))
    write_rows(root / "validation.jsonl", review_rows(20, seed=2))
    (root / "run.yaml").write_text(yaml.safe_dump(run_mapping(seen_from)), encoding="utf-8")
    return World(root)


def run_mapping(root: Path) -> dict[str, Any]:
    """The config over the files of `make_world`; on one device, so that all runs agree in bits."""
    return {
        "output_dir": str(root / "run"),
        "seed": 3,
        "backbone": {"name": str(root / "backbone")},
        "task": {
            "name": "tiny",
            "source": {
                "train": str(root / "train.jsonl"),
                "validation": str(root / "validation.jsonl"),
            },
            "input": "{text}",
            "target": "{label}",
            "candidates": ["positive", "negative"],
        },
        "method": {"length": 4, "init": "vocab"},
        "data": {
            "batch_size": 8, "eval_batch_size": 8, "max_input_length": 20, "max_target_length": 4,
            "length_buckets": [20], "window_batches": 4,
        },
        "train": {"steps": 20, "eval_every": 10, "save_every": 5, "log_every": 1},
        "mesh": {"data": 1},
        "logging": {"terminal": False, "line_seconds": 0.0},
    }  # fmt: skip


def mixture_of(world: World, **rates: float | None) -> str:
    """The override for a mixture of tasks over the world's rows, each with words of its own."""
    task: dict[str, Any] = run_mapping(world.root)["task"]
    words = [("positive", "negative"), ("good", "bad"), ("great", "terrible")]
    entries = {}
    for (name, rate), (yes, no) in zip(rates.items(), words, strict=False):
        labels = {"positive": yes, "negative": no}
        own = {"name": name, "source": task["source"], "labels": labels}
        entries[name] = {"rate": rate, "task": own}
    return f"task={json.dumps({'mixture': entries})}"


def write_backbone(directory: Path, seed: int = 1, **changes: Any) -> Path:
    """A random T5 in the Hugging Face layout, with the tiny vocabulary."""
    config = dataclasses.replace(CONFIG, **changes)

    def louder(path: str, leaf: np.ndarray) -> np.ndarray:
        factors = [factor for part, factor in _LOUDNESS.items() if part in path]
        return (leaf * np.prod(factors)).astype(np.float32)

    save_hf(directory, trees.map_with_path(louder, make_params(config, seed)), config)
    write_tokenizer(directory)
    return directory


def review_rows(count: int, seed: int, longest: int = 12) -> list[dict[str, str]]:
    """Texts of 2 to `longest` words whose label one of the words tells, positive twice of three."""
    draw = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        positive = number % 3 != 0
        words = draw.choice(REST.split(), draw.integers(1, longest)).tolist()
        word = str(draw.choice((GOOD if positive else BAD).split()))
        words.insert(int(draw.integers(0, len(words) + 1)), word)
        rows.append({"text": " ".join(words), "label": "positive" if positive else "negative"})
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def source_of(world: World, name: str) -> Path:
    """A soft prompt of 4 slots for the world's backbone, made once."""
    place = world.root / name
    if not place.exists():
        rows = np.random.default_rng(len(name)).normal(size=(4, CONFIG.d_model))
        save_artifact(place, PromptArtifact(
            method={"name": "soft", "length": 4},
            layout="{prompt}{input}",
            task={},
            backbone=BackboneIdentity("", fingerprint(world.root / "backbone"), CONFIG.d_model),
            values={"prompt": rows.astype(np.float32)},
        ))  # fmt: skip
    return place


def records(directory: Path) -> list[dict[str, Any]]:
    """What a run wrote into metrics.jsonl, but for its speed."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    unstable = "examples_per_second"
    return [{k: v for k, v in json.loads(line).items() if k != unstable} for line in lines]


def losses(directory: Path) -> list[float]:
    """The loss of every step of a run."""
    return [record["loss"] for record in records(directory) if "loss" in record]


def prompt_bytes(directory: Path) -> bytes:
    """The parameters in an artifact."""
    return (directory / "prompt.safetensors").read_bytes()


def saved_state(directory: Path) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
    """Step, arrays by path and metadata of a run's newest checkpoint."""
    with Checkpoints(directory / "checkpoints") as checkpoints:
        newest = f"step_{checkpoints.steps()[-1]:08d}"
        text = (checkpoints.directory / newest / "manifest.json").read_text(encoding="utf-8")
        leaves = json.loads(text)["leaves"]
        wanted = {name: np.empty(leaf["shape"], leaf["dtype"]) for name, leaf in leaves.items()}
        found = checkpoints.restore_latest(wanted)
    assert found is not None
    step, arrays, metadata = found
    return step, {name: np.asarray(array) for name, array in arrays.items()}, metadata


def assert_same_end(left: Path, right: Path) -> None:
    """Two runs came to the same prompts, state and records, to the bit."""
    for name in ("prompt", "best"):
        assert prompt_bytes(left / name) == prompt_bytes(right / name), name
    (step, arrays, metadata), (other_step, others, other_metadata) = map(saved_state, (left, right))
    assert step == other_step and metadata["data"] == other_metadata["data"]
    assert {k: v.tobytes() for k, v in arrays.items()} == {
        k: v.tobytes() for k, v in others.items()
    }
    assert records(left) == records(right)


def snapshot(root: Path) -> dict[str, str]:
    """Digest of every file below a directory."""
    files = (path for path in sorted(root.rglob("*")) if path.is_file())
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def environment(**changes: str) -> dict[str, str]:
    """Variables for a process that computes as the tests do."""
    return {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "8",
        **{name.upper(): str(jax.config.values[name]) for name in _COMPILER},
        **changes,
    }


def spawn(*argv: object, **variables: str) -> subprocess.Popen[str]:
    """`jaxprompt ARGV` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "jaxprompt", *map(str, argv)],
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
