"""Text to token ids and back; the only file that touches transformers' tokenizers.

Everything else in the project sees `Tokenizer`, which hides the differences between T5's
SentencePiece vocabularies, mT5's, and ByT5's bytes.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxprompt.typing import UserError

_VOCABULARIES = ("tokenizer.json", "spiece.model")
_NO_LIMIT = 10**9  # rows are cut by this project's own layout, with counts, never by a tokenizer


class Tokenizer:
    """A vocabulary: encodes without adding an end token, decodes up to one.

    Attributes: pad_id, eos_id, unk_id (unk_id is -1 where a vocabulary has no such token), size
    (how many ids there are, sentinels included; a backbone's table may have more rows).
    """

    def __init__(self, backend: Any, directory: str):
        if backend.pad_token_id is None or backend.eos_token_id is None:
            raise UserError(
                f"the tokenizer in {directory} has no pad or end token; a T5 tokenizer has both"
            )
        self._backend = backend
        self._directory = directory
        self.pad_id: int = backend.pad_token_id
        self.eos_id: int = backend.eos_token_id
        self.unk_id: int = -1 if backend.unk_token_id is None else backend.unk_token_id
        self.size: int = len(backend)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end token; empty when nothing is left of the text."""
        return self.encode_many([text])[0]

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` for many texts at once; several times faster than one by one."""
        if not texts:
            return []
        encoded = self._backend(
            list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False
        )
        return encoded["input_ids"]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids before the first end token; pads are dropped, sentinels are shown."""
        kept = []
        for token in map(int, ids):
            if token == self.eos_id:
                break
            if token != self.pad_id:
                kept.append(token)
        return self._backend.decode(kept, clean_up_tokenization_spaces=False).strip()

    def piece(self, token: int) -> str:
        """The vocabulary's own spelling of one id, with its word-start mark; "" for unused ids."""
        return self._backend.convert_ids_to_tokens(int(token)) or ""

    def sentinel_id(self, number: int) -> int:
        """Id of `<extra_id_{number}>`, the marks of span corruption.

        Raises: UserError if the vocabulary has no such sentinel.
        """
        for spelling in (f"<extra_id_{number}>", f"▁<extra_id_{number}>"):  # T5's, mT5's
            token = self._backend.convert_tokens_to_ids(spelling)
            if token is not None and token != self.unk_id:
                return token
        raise UserError(f"the tokenizer in {self._directory} has no sentinel <extra_id_{number}>")

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer's files into `directory` in the Hugging Face layout."""
        self._backend.save_pretrained(str(directory))


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a backbone's directory (or of `spiece.model` or `tokenizer.json` alone).

    Raises: UserError if the directory has no tokenizer that can be read.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory with a tokenizer in it")
    # It would say on import that it found no torch; nothing here wants one.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    def has(*names: str) -> bool:
        return any((folder / name).is_file() for name in names)

    if has("tokenizer_config.json", "config.json") and has(*_VOCABULARIES, "tokenizer_config.json"):
        reader: Any = transformers.AutoTokenizer
    elif has(*_VOCABULARIES):
        reader = transformers.T5Tokenizer
    else:
        raise UserError(
            f"{folder} has no tokenizer; it wants one of {', '.join(_VOCABULARIES)}"
            " or a tokenizer_config.json"
        )
    try:
        backend = reader.from_pretrained(
            str(folder), local_files_only=True, model_max_length=_NO_LIMIT
        )
    except (ValueError, OSError, KeyError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the tokenizer in {folder} cannot be read: {reason}") from error
    return Tokenizer(backend, str(folder))
