"""Trains the SentencePiece vocabulary of jaxprompt-mini and writes it as a T5 tokenizer directory.

Called by `prepare.py`. Needs sentencepiece, tokenizers and (to check the result) transformers.
"""

from __future__ import annotations

import io
import json
import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece as sp
from sentencepiece import sentencepiece_model_pb2 as sp_proto
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

SENTINELS = 100
BOOSTED = (
    "positive negative good bad yes no true false entailment contradiction neutral equivalent "
    "acceptable unacceptable different same film food clothing travel electronics books great "
    "terrible movie review novel article sentence question answer sentiment topic sport music "
    "science animals history politics recommend avoid"
).split()
BOOST = 6000  # times each boosted word is repeated in the training sample
SHARES = {"imdb": 0.45, "wikipedia": 0.3, "novels": 0.25}


def balanced_sample(
    passages: Iterable[tuple[str, str]], chars: int, rng: random.Random
) -> list[str]:
    """Takes (source, text) pairs until every source has its share of `chars` characters."""
    left = {source: share * chars for source, share in SHARES.items()}
    sample = []
    for source, text in passages:
        if left[source] > 0:
            left[source] -= len(text)
            sample.append(text)
    rng.shuffle(sample)
    return sample


def boosted_lines() -> Iterator[str]:
    for word in BOOSTED:
        for _ in range(BOOST // 50):
            yield " ".join([word] * 50)


def train(texts: Sequence[str], vocab_size: int) -> bytes:
    """SentencePiece unigram model with T5's special ids; returns the serialised model."""
    model = io.BytesIO()
    sp.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, *boosted_lines()]),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        character_coverage=0.9995,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        pad_piece="<pad>",
        eos_piece="</s>",
        unk_piece="<unk>",
        normalization_rule_name="nmt_nfkc",
        split_digits=True,
        byte_fallback=False,
        num_threads=2,
        minloglevel=1,
    )
    return model.getvalue()


def fast_tokenizer(model_bytes: bytes) -> Tokenizer:
    """The same vocabulary for the `tokenizers` library, with the sentinels on top."""
    proto = sp_proto.ModelProto.FromString(model_bytes)
    vocabulary = [(piece.piece, piece.score) for piece in proto.pieces]
    vocabulary += [(sentinel(number), 0.0) for number in reversed(range(SENTINELS))]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
            normalizers.Strip(),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token in ("<pad>", "</s>", "<unk>", *map(sentinel, range(SENTINELS)))
        ]
    )
    return tokenizer


def sentinel(number: int) -> str:
    return f"<extra_id_{number}>"


def write_directory(model_bytes: bytes, folder: Path) -> None:
    """Writes spiece.model, tokenizer.json and the two configuration files of a T5 tokenizer."""
    temporary = folder.with_name(folder.name + ".part")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    (temporary / "spiece.model").write_bytes(model_bytes)
    fast_tokenizer(model_bytes).save(str(temporary / "tokenizer.json"))
    special = {
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "additional_special_tokens": [sentinel(number) for number in range(SENTINELS)],
    }
    config = special | {
        "tokenizer_class": "T5Tokenizer",
        "extra_ids": SENTINELS,
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
    }
    for name, content in (("special_tokens_map", special), ("tokenizer_config", config)):
        path = temporary / f"{name}.json"
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def check_directory(folder: Path, texts: Sequence[str]) -> dict[str, object]:
    """Compares AutoTokenizer with SentencePiece on `texts` and looks at the sentinels.

    Raises: ValueError on the first difference.
    Returns: boosted words that are not single pieces, and the number of texts compared.
    """
    from transformers import AutoTokenizer

    hf = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    pieces = sp.SentencePieceProcessor(model_file=str(folder / "spiece.model"))
    size = pieces.get_piece_size()
    for text in texts:
        ours, theirs = [*pieces.encode(text), 1], hf(text)["input_ids"]
        if ours != theirs:
            raise ValueError(f"SentencePiece gives {ours}, AutoTokenizer {theirs} for {text!r}")
    for number in range(SENTINELS):
        want = size + SENTINELS - 1 - number
        got = hf.convert_tokens_to_ids(sentinel(number))
        if got != want or hf(f"a {sentinel(number)} b")["input_ids"].count(want) != 1:
            raise ValueError(f"{sentinel(number)} must be id {want}, AutoTokenizer has {got}")
    if len(hf) != size + SENTINELS:
        raise ValueError(f"{size} pieces and {SENTINELS} sentinels, AutoTokenizer has {len(hf)}")
    split = [word for word in BOOSTED if len(pieces.encode(word)) > 1]
    return {"texts_compared": len(texts), "boosted_words_split": split}
