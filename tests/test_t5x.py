"""T5X and Orbax checkpoints: every layout gives our parameters and our answers, or one sentence."""

import dataclasses
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from t5x_writer import Flat, scanned_tree, t5x_tree, write_old_orbax, write_orbax, write_t5x
from tiny import make_params

from jaxprompt.arraystore import ArrayStore
from jaxprompt.sharding import make_mesh, tree_shardings
from jaxprompt.t5.backbones import fingerprint, read_config
from jaxprompt.t5.config import T5Config
from jaxprompt.t5.layers import param_specs
from jaxprompt.t5.t5x import open_t5x
from jaxprompt.t5.t5x_config import derive_config
from jaxprompt.t5.weight_files import open_weights
from jaxprompt.t5.weights import load_params, save_hf
from jaxprompt.tensorfile import StoredTensor, write_safetensors
from jaxprompt.trees import flatten

CONFIG = T5Config(
    vocab_size=23, d_model=12, d_kv=5, d_ff=16, num_layers=3, num_decoder_layers=2, num_heads=4,
    relative_attention_num_buckets=8,
)  # fmt: skip
SQUARE = dataclasses.replace(CONFIG, d_kv=3)  # heads x head size = d_model
TIED = dataclasses.replace(
    CONFIG, tie_word_embeddings=True, scale_decoder_outputs=True, gated=False, activation="relu"
)
OWN = dataclasses.replace(CONFIG, per_layer_relative_bias=True, model_type="umt5")


def plain(directory: Path, params: dict, **options: Any) -> Path:
    return write_t5x(directory, t5x_tree(params), **options)


WRITERS: dict[str, tuple[T5Config, Callable[[Path, dict], Path]]] = {
    "version 3": (CONFIG, plain),
    "square": (SQUARE, plain),
    "tied, not gated": (TIED, plain),
    "version 2": (CONFIG, lambda d, p: plain(d, p, version=2, driver="file")),
    "written to gs": (CONFIG, lambda d, p: plain(d, p, driver="gcs")),
    "path beside kvstore": (CONFIG, lambda d, p: plain(d, p, driver="old")),
    "all inline": (CONFIG, lambda d, p: plain(d, p, inline=lambda name: True)),
    "none inline": (CONFIG, lambda d, p: plain(d, p, inline=lambda name: False)),
    "every other inline": (CONFIG, lambda d, p: plain(d, p, inline=lambda name: len(name) % 2)),
    "scanned": (OWN, lambda d, p: write_t5x(d, scanned_tree(p))),
    "scanned, one bias": (SQUARE, lambda d, p: write_t5x(d, scanned_tree(p, "same"))),
    "scanned, named after the stack": (OWN, lambda d, p: write_t5x(d, scanned_tree(p, "same"))),
    "layers with biases": (OWN, plain),
    "orbax": (CONFIG, lambda d, p: write_orbax(d, t5x_tree(p), use_ocdbt=True)),
    "orbax, zarr 3": (
        SQUARE, lambda d, p: write_orbax(d, t5x_tree(p), use_ocdbt=True, use_zarr3=True)
    ),
    "orbax, directories": (TIED, lambda d, p: write_orbax(d, t5x_tree(p), use_ocdbt=False)),
    "orbax, whole": (CONFIG, lambda d, p: write_orbax(d, t5x_tree(p), whole=True)),
    "orbax, scanned": (OWN, lambda d, p: write_orbax(d, scanned_tree(p), use_ocdbt=True)),
    "orbax, placeholders": (CONFIG, lambda d, p: write_old_orbax(d, t5x_tree(p))),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITERS)
def test_every_layout_gives_our_parameters(case: str, tmp_path: Path):
    config, write = WRITERS[case]
    params = make_params(config)
    checkpoint = write(tmp_path / "checkpoint_3", params)
    assert derive_config(open_weights(checkpoint)) == config
    loaded, expected = flatten(load_params(checkpoint, config)), flatten(params)
    assert loaded.keys() == expected.keys()
    for path, leaf in loaded.items():
        np.testing.assert_array_equal(leaf, expected[path], path, strict=True)


# transformers' own converter, for a model of one layer: T5X's name, torch's, whether it is turned
ATTENTION = [("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")]
BIAS = "layer.0.SelfAttention.relative_attention_bias.weight"
TABLE = [
    ("token_embedder/embedding", "shared.weight", False),
    ("encoder/relpos_bias/rel_embedding", f"encoder.block.0.{BIAS}", True),
    ("decoder/relpos_bias/rel_embedding", f"decoder.block.0.{BIAS}", True),
    ("encoder/encoder_norm/scale", "encoder.final_layer_norm.weight", False),
    ("decoder/decoder_norm/scale", "decoder.final_layer_norm.weight", False),
    ("decoder/logits_dense/kernel", "lm_head.weight", True),
    *(
        (f"{stack}/layers_0/{ours}/{kernel}/kernel",
         f"{stack}.block.0.{theirs}.{name}.weight", True)
        for stack, ours, theirs, kernels in (
            ("encoder", "attention", "layer.0.SelfAttention", ATTENTION),
            ("encoder", "mlp", "layer.1.DenseReluDense", [(w, w) for w in ("wi_0", "wi_1", "wo")]),
            ("decoder", "self_attention", "layer.0.SelfAttention", ATTENTION),
            ("decoder", "encoder_decoder_attention", "layer.1.EncDecAttention", ATTENTION),
            ("decoder", "mlp", "layer.2.DenseReluDense", [(w, w) for w in ("wi_0", "wi_1", "wo")]),
        )
        for kernel, name in kernels
    ),
    *(
        (f"{stack}/layers_0/pre_{norm}_layer_norm/scale",
         f"{stack}.block.0.layer.{number}.layer_norm.weight", False)
        for stack, norms in (
            ("encoder", ["attention", "mlp"]),
            ("decoder", ["self_attention", "cross_attention", "mlp"]),
        )
        for number, norm in enumerate(norms)
    ),
]  # fmt: skip


def test_names_and_matrices_are_those_of_transformers_converter(tmp_path: Path):
    """Square kernels too: what is turned and what is not comes from that table, not from ours."""
    one = dataclasses.replace(SQUARE, num_layers=1, num_decoder_layers=1, d_ff=12)
    target = t5x_tree(make_params(one))
    assert {name for name, _, _ in TABLE} == target.keys()
    torch = {theirs: target[ours].T if turned else target[ours] for ours, theirs, turned in TABLE}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(one.to_hf()))
    write_safetensors(tmp_path / "hf" / "model.safetensors", torch)
    expected = flatten(load_params(tmp_path / "hf", one))
    loaded = flatten(load_params(write_t5x(tmp_path / "t5x", target), one))
    for path, leaf in expected.items():
        np.testing.assert_array_equal(loaded[path], leaf, path, strict=True)


def bfloat16(target: Flat) -> Flat:
    return {name: array.astype(ml_dtypes.bfloat16) for name, array in target.items()}


@pytest.mark.parametrize("version", [2, 3])
def test_bfloat16_as_itself_and_as_its_bits(version: int, tmp_path: Path):
    params = make_params(CONFIG)
    write_t5x(tmp_path, bfloat16(t5x_tree(params)), version=version)
    for name, stored in open_weights(tmp_path).tensors.items():
        assert stored.dtype == ml_dtypes.bfloat16, name
    loaded = flatten(load_params(tmp_path, CONFIG, dtype="bfloat16"))
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(loaded[path], leaf.astype(jnp.bfloat16), path)


def test_each_device_holds_its_shards(tmp_path: Path):
    config = dataclasses.replace(CONFIG, vocab_size=24)
    params = make_params(config)
    write_t5x(tmp_path, scanned_tree(params))
    shardings = tree_shardings(make_mesh(2, 2), param_specs(config))
    loaded = load_params(tmp_path, config, shardings=shardings)
    for leaf, expected, sharding in zip(
        *map(jax.tree.leaves, (loaded, params, shardings)), strict=True
    ):
        assert leaf.sharding == sharding
        np.testing.assert_array_equal(leaf, expected)


def test_a_stacked_array_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    params = make_params(CONFIG)
    write_t5x(tmp_path, scanned_tree(params), inline=lambda name: False)
    reads: list[str] = []
    open_arrays = ArrayStore.open_arrays

    def counting(self: ArrayStore, names: Any, **options: Any) -> dict[str, StoredTensor]:
        def counted(name: str, stored: StoredTensor) -> StoredTensor:
            def read() -> np.ndarray:
                reads.append(name)
                return stored.read()

            return dataclasses.replace(stored, read=read)

        opened = open_arrays(self, names, **options)
        return {name: counted(name, stored) for name, stored in opened.items()}

    monkeypatch.setattr(ArrayStore, "open_arrays", counting)
    load_params(tmp_path, CONFIG, host_bytes=1)
    assert sorted(reads) == sorted(set(reads)) and len(reads) == len(scanned_tree(params))


def test_a_prompt_in_the_checkpoint_is_not_the_backbone(tmp_path: Path):
    target = t5x_tree(make_params(CONFIG))
    prompt = {"encoder/prompt/prompt/prompt": np.ones((2, 12), np.float32)}
    write_t5x(tmp_path, target | prompt)
    assert load_params(tmp_path, CONFIG)
    opened = open_t5x(str(tmp_path))
    assert opened is not None and opened.prompts.keys() == prompt.keys()


def test_a_t5x_checkpoint_with_its_config_beside_it_is_a_backbone(tmp_path: Path):
    write_t5x(tmp_path, t5x_tree(make_params(CONFIG)))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_hf()))
    assert read_config(tmp_path) == CONFIG
    save_hf(tmp_path / "other", make_params(CONFIG), CONFIG)
    assert fingerprint(tmp_path) == fingerprint(tmp_path / "other")


# ---- Google Cloud Storage, by a server of our own ------------------------------------------------


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A directory that is served as the bucket "t5-data", and the environment that finds it."""
    root = tmp_path / "bucket"
    root.mkdir()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            url = urllib.parse.urlparse(self.path)
            prefix = "/storage/v1/b/t5-data/o/"
            path = root / urllib.parse.unquote(url.path.removeprefix(prefix))
            found = url.path.startswith(prefix) and path.is_file()
            content = path.read_bytes() if found else b""
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            self.send_response(404 if not found else 206 if wanted else 200)
            if found and wanted:
                first, last = int(wanted[1]), int(wanted[2] or len(content) - 1)
                span = f"bytes {first}-{min(last, len(content) - 1)}/{len(content)}"
                self.send_header("Content-Range", span)
                content = content[first : last + 1]
            self.send_header("Content-Length", str(len(content)))
            self.send_header("x-goog-generation", "1")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    here = f"127.0.0.1:{server.server_port}"
    yield (
        root,
        {
            "TENSORSTORE_GCS_HTTP_URL": f"http://{here}",
            "GCE_METADATA_ROOT": here,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "no_proxy": "*",
        },
    )
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("orbax", [False, True])
def test_a_checkpoint_on_google_cloud_storage(
    orbax: bool, bucket: tuple[Path, dict[str, str]], tmp_path: Path
):
    root, environment = bucket
    target = t5x_tree(make_params(CONFIG))
    write = write_orbax if orbax else write_t5x
    write(root / "models" / "checkpoint_3", target)
    place = "gs://t5-data/models/checkpoint_3"

    def convert(source: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "jaxprompt", "convert", source, str(tmp_path / "out")],
            env=os.environ | environment, cwd=Path(__file__).parents[1],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip

    done = convert(f"{place}0")
    assert done.returncode == 2 and f"error: {place}0: holds no weights" in done.stderr
    done = convert(place)
    assert done.returncode == 0 and "3 + 2 layers" in done.stdout, done.stderr
    save_hf(tmp_path / "ours", make_params(CONFIG), CONFIG)
    assert fingerprint(tmp_path / "out") == fingerprint(tmp_path / "ours")
