"""The public functions, against the backbone's own functions and against torch."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_backbone import CONFIG, SLOTS, make_prompt, write_backbone

import jaxprompt as jp
from jaxprompt.artifact import PromptArtifact, save_artifact
from jaxprompt.backbone import Backbone
from jaxprompt.t5 import model as t5
from jaxprompt.t5.config import Compute
from jaxprompt.typing import UserError

ENCODER_IDS = np.array([[5, 9, 13, 1, 0, 0], [7, 0, 30, 31, 32, 1], [8, 8, 0, 0, 0, 0]])
LONGEST = 12
DECODER_IDS = np.array([[0, 4, 5], [0, 9, 1], [0, 0, 12]])
TEXTS = ["a good film", "the food was bad and the service terrible", "travel"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def backbone(directory: Path) -> Backbone:
    return jp.load_backbone(str(directory))


@pytest.fixture(scope="module")
def prompt(directory: Path) -> PromptArtifact:
    return make_prompt(directory)


@jax.jit
def run_by_hand(params: dict, embeds: jax.Array, seen: jax.Array, ids: jax.Array) -> jax.Array:
    compute, segments = Compute(), seen.astype(jnp.int32)
    encoded = t5.encode(params, CONFIG, compute, embeds, segments)
    inputs = t5.embed_tokens(params, ids, compute)
    hidden = t5.decode(params, CONFIG, compute, inputs, jnp.ones_like(ids), encoded, segments)
    return t5.logits(params, CONFIG, hidden)


def logits_by_hand(backbone: Backbone, rows: list[list[int | np.ndarray | None]]) -> np.ndarray:
    """Logits of rows given as token ids, embeddings (slots) and None (masked)."""
    table = np.asarray(backbone.params["token_embedder"]["embedding"])
    padded = [row + [None] * (LONGEST - len(row)) for row in rows]
    embeds = [[x if isinstance(x, np.ndarray) else table[x or 0] for x in row] for row in padded]
    seen = [[x is not None for x in row] for row in padded]
    return run_by_hand(backbone.params, np.array(embeds), np.array(seen), DECODER_IDS)


def test_logits_of_the_bare_backbone(backbone: Backbone):
    rows = [[5, 9, 13, 1], [7, None, 30, 31, 32, 1], [8, 8]]
    got = jp.logits(backbone, None, ENCODER_IDS, DECODER_IDS)
    assert got.shape == (3, 3, CONFIG.vocab_size) and got.dtype == jnp.float32
    np.testing.assert_allclose(got, logits_by_hand(backbone, rows), atol=1e-4)


def test_logits_put_slots_where_the_layout_has_them(backbone: Backbone, prompt: PromptArtifact):
    p, q, r = prompt.values["prompt"]
    word = backbone.tokenizer.encode("film")
    layouts = {
        "{prompt}{input}": lambda text, end: [p, q, r, *text, *end],
        "{input}{prompt}": lambda text, end: [*text, p, q, r, *end],
        "{prompt:1}film{input}{prompt}": lambda text, end: [p, *word, *text, q, r, *end],
    }
    rows = [([5, 9, 13], [1]), ([7, None, 30, 31, 32], [1]), ([8, 8], [])]
    for layout, lay in layouts.items():
        laid = dataclasses.replace(prompt, layout=layout)
        expected = logits_by_hand(backbone, [lay(*row) for row in rows])
        got = jp.logits(backbone, laid, ENCODER_IDS, DECODER_IDS)
        np.testing.assert_allclose(got, expected, atol=1e-4, err_msg=layout)


def test_logits_equal_torch(directory: Path, backbone: Backbone, prompt: PromptArtifact):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model = transformers.T5ForConditionalGeneration.from_pretrained(directory)
    slots = torch.tensor(prompt.values["prompt"]).expand(3, -1, -1)
    ids = torch.tensor(ENCODER_IDS)
    with torch.no_grad():
        expected = model(
            inputs_embeds=torch.cat([slots, model.shared(ids)], dim=1),
            attention_mask=torch.cat([torch.ones(3, SLOTS), ids != 0], dim=1),
            decoder_input_ids=torch.tensor(DECODER_IDS),
        ).logits.numpy()
    got = jp.logits(backbone, prompt, ENCODER_IDS, DECODER_IDS)
    np.testing.assert_allclose(got, expected, atol=1e-4)


def log_likelihood(backbone: Backbone, prompt: PromptArtifact | None, text: str, answer: str):
    """The summed log-likelihood of one answer, by way of `logits`."""
    target = [*backbone.tokenizer.encode(answer), 1]
    inputs = padded([*backbone.tokenizer.encode(text), 1])
    logits = jp.logits(backbone, prompt, [inputs], [padded([0, *target[:-1]])])[0]
    log_probabilities = jax.nn.log_softmax(logits)
    return sum(log_probabilities[at, token] for at, token in enumerate(target))


def padded(ids: list[int]) -> list[int]:
    """One length, so that one program does for all."""
    return ids + [0] * (LONGEST - len(ids))


@pytest.mark.parametrize("bare", [False, True])
def test_score_is_the_log_likelihood_of_target_and_end(
    backbone: Backbone, prompt: PromptArtifact, bare: bool
):
    used = None if bare else prompt
    candidates = ["positive", "it was not good", "bad"]
    scores = jp.score(backbone, used, TEXTS, candidates)
    assert scores.shape == (3, 3) and scores.dtype == np.float32
    expected = [[log_likelihood(backbone, used, text, c) for c in candidates] for text in TEXTS]
    np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_score_takes_the_candidates_of_the_task(backbone: Backbone, prompt: PromptArtifact):
    rows = [{"text": text} for text in TEXTS]
    np.testing.assert_array_equal(
        jp.score(backbone, prompt, rows),
        jp.score(backbone, prompt, TEXTS, ["negative", "terrible", "about food"]),
    )
    assert jp.score(backbone, prompt, []).shape == (0, 3)


def test_generate_takes_the_likeliest_token_each_time(backbone: Backbone, prompt: PromptArtifact):
    tokenizer, longest = backbone.tokenizer, 5
    expected = []
    for text in TEXTS:
        said: list[int] = []
        for _ in range(longest):
            inputs = padded([*tokenizer.encode(text), 1])
            logits = jp.logits(backbone, prompt, [inputs], [padded([0, *said])])
            said.append(int(np.argmax(logits[0, len(said)])))
        expected.append(tokenizer.decode(said))
    assert jp.generate(backbone, prompt, TEXTS, max_new_tokens=longest) == expected
    assert len(set(expected)) > 1


def test_load_prompt(directory: Path, backbone: Backbone, prompt: PromptArtifact, tmp_path: Path):
    save_artifact(tmp_path / "prompt", prompt)
    np.save(tmp_path / "prompt.npy", prompt.values["prompt"])
    loaded = [jp.load_prompt(str(tmp_path / name)) for name in ("prompt", "prompt.npy")]
    first, second = (jp.logits(backbone, p, ENCODER_IDS, DECODER_IDS) for p in loaded)
    np.testing.assert_array_equal(first, second)
    other = jp.load_backbone(str(write_backbone(tmp_path, seed=1)))
    with pytest.raises(UserError, match=r"was trained with backbone .*backbone-0.*backbone-1"):
        jp.logits(other, loaded[0], ENCODER_IDS, DECODER_IDS)
    anywhere = jp.load_prompt(str(tmp_path / "prompt"), any_backbone=True)
    assert jp.logits(other, anywhere, ENCODER_IDS, DECODER_IDS).shape == (3, 3, 144)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, p: jp.logits(b, p, [1, 2], DECODER_IDS), r"encoder_ids is int64 \[2\]"),
        (lambda b, p: jp.logits(b, p, [[0.5]], [[0]]), "encoder_ids is float64"),
        (lambda b, p: jp.logits(b, p, [[999]], [[0]]), r"lie in 999\.\.999, .* 0\.\.143"),
        (lambda b, p: jp.logits(b, p, [[5]], DECODER_IDS), "has 1 rows, decoder_ids 3"),
        (
            lambda b, p: jp.logits(
                b, dataclasses.replace(p, layout="{prompt}{title}"), [[5]], [[0]]
            ),
            "takes field 'title'",
        ),
        (lambda b, p: jp.score(b, None, TEXTS), "score needs candidates"),
        (lambda b, p: jp.score(b, p, "a text"), "give a list of texts"),
        (lambda b, p: jp.score(b, p, ["  "]), r"inputs\[0\] has no text"),
        (lambda b, p: jp.score(b, p, [{"texts": "a"}]), r"inputs\[0\] has no field 'text'"),
        (lambda b, p: jp.generate(b, p, TEXTS, num_beams=0), "num_beams is 0"),
        (lambda b, p: jp.generate(b, p, TEXTS, max_new_tokens=0), "max_new_tokens is 0"),
        (
            lambda b, p: jp.score(b, dataclasses.replace(p, method={"name": "x"}), TEXTS),
            "'x' is not known; there are soft",
        ),
    ],
)
def test_what_a_user_gets_wrong(backbone: Backbone, prompt: PromptArtifact, call, message: str):
    with pytest.raises(UserError, match=message):
        call(backbone, prompt)
