"""The backbones in the package: sizes, loading here and in torch, cards, tokenizers."""

import json
from pathlib import Path

import numpy as np
import pytest

import jaxprompt as jp
from jaxprompt.backbone import Backbone
from jaxprompt.t5.backbones import PACKAGED

MAX_MB = {"jaxprompt-mini": 20, "jaxprompt-nano": 2}
TEXTS = (
    "Is this a review or a message to support?",
    "Why, sir -- 'tis 3.50 pounds; no more!",
    "two words<extra_id_0> two more<extra_id_1>",
)


@pytest.fixture(scope="module", params=PACKAGED)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def backbone(name: str) -> Backbone:
    return jp.load_backbone(name)


def test_a_packaged_backbone_is_small(name: str):
    files = list(PACKAGED[name].directory.iterdir())
    assert sum(file.stat().st_size for file in files) <= MAX_MB[name] * 1_000_000


def test_a_packaged_backbone_answers(backbone: Backbone):
    texts = jp.generate(backbone, None, ["Is this a film review? It was dull."], max_new_tokens=4)
    assert len(texts) == 1 and isinstance(texts[0], str)
    assert backbone.tokenizer.size <= backbone.config.vocab_size


def test_nano_has_mini_s_vocabulary_in_one_file():
    mini, nano = (jp.load_backbone(name) for name in MAX_MB)
    assert nano.config.tie_word_embeddings and nano.config.scale_decoder_outputs
    assert not (nano.directory / "spiece.model").exists()
    assert nano.tokenizer.size == mini.tokenizer.size
    assert nano.tokenizer.encode_many(TEXTS) == mini.tokenizer.encode_many(TEXTS)


def test_a_packaged_tokenizer_round_trips(backbone: Backbone):
    tokenizer = backbone.tokenizer
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.unk_id not in ids and tokenizer.eos_id not in ids
        assert tokenizer.decode(ids) == text
    assert tokenizer.sentinel_id(0) in tokenizer.encode(TEXTS[-1])


def test_transformers_reads_a_packaged_directory_and_computes_the_same(backbone: Backbone):
    torch = pytest.importorskip("torch")
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(backbone.directory)
    inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
    rows = [*map(backbone.tokenizer.encode, TEXTS)]
    length = max(map(len, rows)) + 1
    end, pad = backbone.config.eos_id, backbone.config.pad_id
    encoder_BS = np.array([[*row, end, *[pad] * (length - len(row) - 1)] for row in rows])
    np.testing.assert_array_equal(inputs["input_ids"].numpy(), encoder_BS)
    decoder_BT = encoder_BS[:, :5].copy()
    decoder_BT[:, 0] = backbone.config.decoder_start_id
    model = transformers.T5ForConditionalGeneration.from_pretrained(
        backbone.directory, dtype=torch.float32
    )
    with torch.no_grad():
        theirs = model(**inputs, decoder_input_ids=torch.from_numpy(decoder_BT)).logits.numpy()
    ours = np.asarray(jp.logits(backbone, None, encoder_BS, decoder_BT))
    assert np.abs(ours - theirs).max() < 1e-5 * np.abs(theirs).max()


def test_a_card_is_of_the_backbone_beside_it(name: str, backbone: Backbone):
    card = (backbone.directory / "README.md").read_text(encoding="utf-8")
    assert f"# {name}\n" in card and f"| fingerprint | `{backbone.fingerprint}` |" in card
    for section in ("## Training", "## Data", "## Kept out", "## Scores", "## Limits"):
        assert f"\n{section}" in card


def test_a_prompt_over_nano_learns(tmp_path: Path):
    """Trained weights are to be prompted: random ones would show a run, but no learning."""
    words = [
        "backbone.name=jaxprompt-nano", "task=demo-sentiment", f"output_dir={tmp_path}",
        "method.length=8", "data.batch_size=16", "train.steps=40", "train.eval_every=0",
        "train.save_every=0", "logging.terminal=false",
    ]  # fmt: skip
    result = jp.train(jp.load_config("quickstart", words))
    lines = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    losses = [record["loss"] for line in lines if "loss" in (record := json.loads(line))]
    assert len(losses) == 4 and np.mean(losses[2:]) < 0.75 * losses[0]
    assert result.score > result.baseline("majority")
    text = "The soup was cold and the waiter was rude."
    scores = jp.score(
        jp.load_backbone("jaxprompt-nano"), jp.load_prompt(str(result.prompt)), [text]
    )
    assert scores.shape == (1, 2)
