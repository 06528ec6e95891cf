import json
from pathlib import Path

import pytest
from tiny_tokenizer import SENTINELS, tiny_tokenizer, write_tokenizer

from jaxprompt.data.tokenizer import load_tokenizer
from jaxprompt.typing import UserError


def test_special_ids_are_those_of_t5():
    tokenizer = tiny_tokenizer()
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 2)


def test_encode_adds_no_end_token_and_decode_gives_the_text_back():
    tokenizer = tiny_tokenizer()
    ids = tokenizer.encode("this film was great")
    assert [tokenizer.piece(token) for token in ids] == ["▁this", "▁film", "▁was", "▁great"]
    assert tokenizer.decode(ids) == "this film was great"


def test_encode_many_is_encode_of_each():
    tokenizer = tiny_tokenizer()
    texts = ["good food", "", "a book about travel", "   "]
    assert tokenizer.encode_many(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_many([]) == []
    assert tokenizer.encode("   ") == []


def test_long_texts_are_not_cut_by_the_tokenizer():
    assert len(tiny_tokenizer().encode("film " * 5000)) == 5000


def test_decode_stops_at_the_end_token_drops_pads_and_shows_sentinels():
    tokenizer = tiny_tokenizer()
    good, bad = tokenizer.encode("good bad")
    ids = [tokenizer.pad_id, good, tokenizer.sentinel_id(0), tokenizer.eos_id, bad]
    assert tokenizer.decode(ids) == "good<extra_id_0>"
    assert tokenizer.decode([]) == ""


def test_sentinels_count_down_from_the_top_and_stand_in_text():
    tokenizer = tiny_tokenizer()
    ids = [tokenizer.sentinel_id(number) for number in range(SENTINELS)]
    assert ids == list(range(tokenizer.size - 1, tokenizer.size - 1 - SENTINELS, -1))
    assert tokenizer.encode("good <extra_id_3> book").count(ids[3]) == 1
    with pytest.raises(UserError, match="no sentinel <extra_id_30>"):
        tokenizer.sentinel_id(SENTINELS)


def test_saved_tokenizers_load_again(tmp_path: Path):
    tiny_tokenizer().save(tmp_path)
    text = "a terrible review, with words: 17"
    assert load_tokenizer(tmp_path).encode(text) == tiny_tokenizer().encode(text)


def test_spiece_model_alone_gives_sentencepiece_ids(tmp_path: Path):
    sentencepiece = pytest.importorskip("sentencepiece")
    lines = [
        f"the {a} film was {b} and {c}" for a in "xyzuv" for b in ("good", "bad") for c in "pqr"
    ]
    with open(tmp_path / "spiece.model", "wb") as stream:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=stream, vocab_size=40, pad_id=0, eos_id=1,
            unk_id=2, bos_id=-1, hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    tokenizer = load_tokenizer(tmp_path)
    for text in ("the film was good", "was  the bad x film?", "q"):
        assert tokenizer.encode(text) == pieces.encode(text)
    assert tokenizer.size == pieces.get_piece_size() + 100
    assert tokenizer.sentinel_id(0) == tokenizer.size - 1


def test_byte_tokenizer_of_byt5(tmp_path: Path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("hé") == [byte + 3 for byte in "hé".encode()]
    assert tokenizer.decode(tokenizer.encode("hé, you")) == "hé, you"
    assert tokenizer.sentinel_id(0) == 259


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no tokenizer"),
        ({"config.json": {"model_type": "t5"}}, "has no tokenizer"),
        ({"tokenizer.json": {}}, "cannot be read"),
    ],
)
def test_directories_without_a_tokenizer_are_named(tmp_path: Path, files: dict, message: str):
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_a_missing_directory_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="not a directory"):
        load_tokenizer(tmp_path / "none")


def test_tokenizers_without_an_end_token_are_refused(tmp_path: Path):
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"eos_token": None, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no pad or end token"):
        load_tokenizer(tmp_path)
