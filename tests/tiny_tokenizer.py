"""A T5 tokenizer of a few dozen pieces, made on the spot, for tests that read text."""

import functools
import string
import tempfile
from pathlib import Path

from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer

WORDS = (
    "a about and bad book books clothing film food good great in is it not of on positive negative"
    " review sentence terrible text that the this topic travel was with word words"
)
SENTINELS = 30


def write_tokenizer(directory: str | Path) -> None:
    """Writes a tokenizer in the Hugging Face layout: words, letters and 30 sentinels."""
    from transformers import T5Tokenizer

    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -6.0)]
    vocabulary += [(f"▁{word}", -2.0) for word in WORDS.split()]
    vocabulary += [(letter, -8.0) for letter in string.ascii_letters + string.digits + ".,:!?'-"]
    vocabulary += [(f"<extra_id_{number}>", 0.0) for number in reversed(range(SENTINELS))]
    T5Tokenizer(vocab=vocabulary, extra_ids=SENTINELS).save_pretrained(str(directory))


@functools.cache
def tiny_tokenizer() -> Tokenizer:
    """The tokenizer of `write_tokenizer`, loaded once."""
    with tempfile.TemporaryDirectory() as directory:
        write_tokenizer(directory)
        return load_tokenizer(directory)
