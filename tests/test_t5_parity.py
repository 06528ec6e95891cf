"""The backbone against transformers' torch T5: golden arrays always, live where torch is there."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprompt.t5 import model as t5
from jaxprompt.t5.attention import relative_position_bucket
from jaxprompt.t5.backbones import fingerprint, read_config
from jaxprompt.t5.config import Compute, T5Config
from jaxprompt.t5.weights import load_params, save_hf
from jaxprompt.tensorfile import write_safetensors

GOLDEN = Path(__file__).parent / "golden"
COMPUTE = Compute(scan_unroll=1)
TOLERANCE = 1e-4


def _golden_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_t5_golden", GOLDEN / "make_t5_golden.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


golden = _golden_script()
every_family = pytest.mark.parametrize("family", golden.FAMILIES)


def _logits(
    params: dict, config: T5Config, embeds_BSD: jax.Array, encoder_ids: Any, decoder_ids: Any
) -> jax.Array:
    segments = jnp.asarray(encoder_ids != 0, jnp.int32)
    encoded = t5.encode(params, config, COMPUTE, embeds_BSD, segments)
    decoder_embeds = t5.embed_tokens(params, decoder_ids, COMPUTE)
    ones = jnp.ones_like(decoder_ids)
    hidden = t5.decode(params, config, COMPUTE, decoder_embeds, ones, encoded, segments)
    return t5.logits(params, config, hidden)


_run = jax.jit(_logits, static_argnums=1)  # one compilation a family, for all tests


def _logits_of(directory: Path, encoder_ids: np.ndarray, decoder_ids: np.ndarray) -> np.ndarray:
    config = read_config(directory)
    params = load_params(directory, config)
    embeds = t5.embed_tokens(params, encoder_ids, COMPUTE)
    return np.asarray(_run(params, config, embeds, encoder_ids, decoder_ids))


def _write(directory: Path, config: dict[str, Any], state: dict[str, np.ndarray]) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    write_safetensors(directory / "model.safetensors", state)
    return directory


def _golden(family: str) -> tuple[dict[str, np.ndarray], dict[str, Any], dict[str, np.ndarray]]:
    with np.load(GOLDEN / f"{family}.npz") as arrays:
        everything = dict(arrays)
    state = {k.removeprefix("state/"): v for k, v in everything.items() if k.startswith("state/")}
    return everything, json.loads(str(everything["config"])), state


@every_family
def test_logits_equal_the_golden_ones(family: str, tmp_path: Path):
    arrays, config, state = _golden(family)
    assert config == golden.FAMILIES[family], "run tests/golden/make_t5_golden.py again"
    directory = _write(tmp_path, config, state)
    ours = _logits_of(directory, arrays["encoder_ids"], arrays["decoder_ids"])
    assert ours.shape == arrays["logits"].shape and ours.dtype == np.float32
    assert np.abs(arrays["logits"]).max() > 1
    np.testing.assert_allclose(ours, arrays["logits"], atol=TOLERANCE, rtol=TOLERANCE)


def test_gradient_of_the_input_embeddings_equals_the_golden_one(tmp_path: Path):
    arrays, config, state = _golden(golden.GRADIENT_FAMILY)
    directory = _write(tmp_path, config, state)
    config = read_config(directory)
    params = load_params(directory, config)
    encoder_ids, decoder_ids = arrays["encoder_ids"], arrays["decoder_ids"]

    def weighted(embeds: jax.Array) -> jax.Array:
        logits = _logits(params, config, embeds, encoder_ids, decoder_ids)
        return jnp.sum(jnp.sin(jnp.arange(logits.size)).reshape(logits.shape) * logits)

    ours = jax.jit(jax.grad(weighted))(t5.embed_tokens(params, encoder_ids, COMPUTE))
    np.testing.assert_allclose(ours, arrays["gradient"], atol=1e-3, rtol=1e-3)


def test_padding_of_the_encoder_changes_nothing(tmp_path: Path):
    arrays, config, state = _golden("mt5")
    directory = _write(tmp_path, config, state)
    wider = np.pad(arrays["encoder_ids"], ((0, 0), (0, 7)))
    ours = _logits_of(directory, wider, arrays["decoder_ids"])
    np.testing.assert_allclose(ours, arrays["logits"], atol=TOLERANCE, rtol=TOLERANCE)


@pytest.fixture(scope="module")
def torch() -> Any:
    return pytest.importorskip("torch")


def _save(torch: Any, directory: Path, model: Any, config: dict[str, Any], how: str) -> Path:
    """Saves a torch model in one of the ways that models on the hub were saved."""
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    state = model.state_dict()
    match how:
        case "transformers":  # safetensors and a config.json as this transformers writes it
            model.save_pretrained(directory)
        case "zip":
            torch.save(state, directory / "pytorch_model.bin")
        case "stream":
            path = directory / "pytorch_model.bin"
            torch.save(state, path, _use_new_zipfile_serialization=False)
        case "sharded":
            weight_map = {}
            for number, names in enumerate((list(state)[::2], list(state)[1::2]), 1):
                shard = f"pytorch_model-0000{number}-of-00002.bin"
                torch.save({name: state[name] for name in names}, directory / shard)
                weight_map |= dict.fromkeys(names, shard)
            index = {"metadata": {}, "weight_map": weight_map}
            (directory / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return directory


@every_family
def test_live_logits_of_what_torch_saved(family: str, torch: Any, tmp_path: Path):
    model = golden.make_model(family, seed=5)
    encoder_ids, decoder_ids = golden.make_inputs(family)
    theirs = golden.torch_logits(model, encoder_ids, decoder_ids)
    identities = set()
    for how in ("zip", "stream", "sharded", "transformers"):
        directory = _save(torch, tmp_path / how, model, golden.FAMILIES[family], how)
        identities.add(fingerprint(directory))
        if how in ("zip", "transformers"):
            ours = _logits_of(directory, encoder_ids, decoder_ids)
            np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert len(identities) == 1, "the same weights, whatever the format"


@every_family
def test_live_what_is_saved_here_loads_in_transformers(family: str, torch: Any, tmp_path: Path):
    _, raw, state = _golden(family)
    source = _write(tmp_path / "source", raw, state)
    config = read_config(source)
    params = load_params(source, config)
    save_hf(tmp_path / "saved", params, config)
    model = golden.make_model(family, seed=9)
    loaded = type(model).from_pretrained(tmp_path / "saved").eval()
    loaded.config.tie_word_embeddings = model.config.tie_word_embeddings
    encoder_ids, decoder_ids = golden.make_inputs(family)
    theirs = golden.torch_logits(loaded, encoder_ids, decoder_ids)
    ours = _logits_of(tmp_path / "saved", encoder_ids, decoder_ids)
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    assert read_config(tmp_path / "saved") == config

    save_hf(tmp_path / "half", params, config, dtype="bfloat16")
    half = type(model).from_pretrained(tmp_path / "half", dtype="bfloat16")
    name = "decoder.block.0.layer.1.EncDecAttention.q.weight"
    expected = torch.from_numpy(state[name]).bfloat16()
    assert torch.equal(half.state_dict()[name], expected)


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 12), (16, 64)])
def test_live_relative_position_buckets(
    torch: Any, bidirectional: bool, num_buckets: int, max_distance: int
):
    from transformers.models.t5.modeling_t5 import T5Attention

    positions = np.arange(-1100, 1101, dtype=np.int32)
    theirs = T5Attention._relative_position_bucket(
        torch.from_numpy(positions).long(), bidirectional, num_buckets, max_distance
    )
    ours = relative_position_bucket(
        jnp.asarray(positions),
        bidirectional=bidirectional,
        num_buckets=num_buckets,
        max_distance=max_distance,
    )
    np.testing.assert_array_equal(ours, theirs.numpy())
