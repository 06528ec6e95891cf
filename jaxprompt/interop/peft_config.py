"""What PEFT's configs and model cards say of a prompt, and which prompts PEFT can express on a T5.

Beside `interop.peft`, which reads and writes the files.
"""

import json
import re
from typing import Any

from jaxprompt.artifact import PromptArtifact
from jaxprompt.data.layout import Layout
from jaxprompt.prompts import METHODS
from jaxprompt.prompts.base import Sizes
from jaxprompt.prompts.p_tuning_v2 import names_of
from jaxprompt.typing import UserError

PEFT_VERSION = "0.21.2"  # whose files these are, to the byte
TASK_TYPE = "SEQ_2_SEQ_LM"
PLACES = ["decoder"]
KEYS, VALUES = names_of("decoder")

_REASONS = {
    "dept": "adds to the input's embeddings",
    "adept": "adds to the input's embeddings",
    "smop": "chooses its slots by the input",
    "pt-moe": "chooses its slots by the input",
} | {name: "is not folded" for name, info in METHODS.items() if info.fold is not None}


def check_expressible(prompt: PromptArtifact) -> None:
    """Raises: UserError, with the reason, for a prompt that PEFT cannot express on a T5."""
    name = prompt.method["name"]
    if name == "soft":
        length = prompt.method["length"]
        if Layout.parse(prompt.layout, length).pieces[0] != length:
            raise UserError(
                f"PEFT puts all slots before the input; this prompt's layout is {prompt.layout!r}"
            )
    elif name == "p-tuning-v2":
        _check_prefix(prompt)
    else:
        why = _REASONS.get(name, "does more than put slots before the input")
        raise UserError(f"PEFT cannot express a prompt of method {name}: it {why}")


def _check_prefix(prompt: PromptArtifact) -> None:
    others = [place for place in prompt.method["places"] if place not in PLACES]
    if others:
        raise UserError(
            "PEFT puts keys and values into a T5 decoder's self-attention alone; this prompt also "
            f"has places {', '.join(others)}"
        )
    if not prompt.method.get("before_text", False):
        raise UserError(
            "PEFT's keys take the relative bias of the positions before the text, this prompt's "
            "were trained without (method.before_text is false)"
        )


def _common(prompt: PromptArtifact, kind: str) -> dict[str, Any]:
    return {
        "auto_mapping": None,
        "base_model_name_or_path": prompt.backbone.name or None,
        "inference_mode": True,
        "modules_to_save": None,
        "num_virtual_tokens": prompt.method["length"],
        "peft_type": kind,
        "peft_version": PEFT_VERSION,
        "revision": None,
        "task_type": TASK_TYPE,
    }


def new_config(prompt: PromptArtifact, sizes: Sizes | None) -> dict[str, Any]:
    """The config, all keys of it, of a prompt that did not come from PEFT.

    Args:
      sizes: of the backbone; a prefix does not need them.
    Raises: UserError for a soft prompt without them.
    """
    if prompt.method["name"] != "soft":
        return _prefix_config(prompt)
    if sizes is None:
        raise UserError(
            "PEFT wants the sizes of a soft prompt's backbone, which is not known; name it with "
            "--backbone"
        )
    return _soft_config(prompt, sizes)


def _soft_config(prompt: PromptArtifact, sizes: Sizes) -> dict[str, Any]:
    return _common(prompt, "PROMPT_TUNING") | {
        "num_attention_heads": sizes.num_heads,
        "num_layers": sizes.num_layers,
        "num_transformer_submodules": 1,  # the encoder's rows alone
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "token_dim": prompt.values["prompt"].shape[1],
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }


def _prefix_config(prompt: PromptArtifact) -> dict[str, Any]:
    layers, _, heads, size = prompt.values[KEYS].shape
    return _common(prompt, "PREFIX_TUNING") | {
        "encoder_hidden_size": heads * size,
        "init_weights": None,
        "num_attention_heads": heads,
        "num_layers": layers,
        "num_transformer_submodules": 2,  # with 1, PEFT cannot run a prefix on a T5
        "prefix_projection": False,
        "token_dim": heads * size,
    }


def card(backbone: str) -> str:
    """A model card with what the hub reads of one."""

    def scalar(value: str) -> str:
        plain = re.fullmatch(r"[A-Za-z][\w./:-]*[\w]", value)
        return value if plain else json.dumps(value)

    return (
        f"---\nbase_model: {scalar(backbone)}\nlibrary_name: peft\ntags:\n"
        f"- {scalar(f'base_model:adapter:{backbone}')}\n---\n\n"
        f"# A prompt for {backbone or 'a frozen T5'}\n\nExported by jaxprompt.\n\n"
        f"### Framework versions\n\n- PEFT {PEFT_VERSION}"
    )
