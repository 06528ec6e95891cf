"""PEFT adapters of tiny T5s: made and asked by PEFT itself, or as `golden/peft.npz` keeps them.

Torch is imported only where PEFT is asked.
"""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from tiny_tokenizer import write_tokenizer

from jaxprompt.t5.config import T5Config
from jaxprompt.t5.weights import save_hf

GOLDEN = Path(__file__).parent / "golden" / "peft.npz"
LENGTH = 4
ENCODER_IDS = np.asarray([[5, 9, 3, 7, 8, 1], [4, 8, 6, 1, 0, 0]])
DECODER_IDS = np.asarray([[0, 6, 2, 9, 5], [0, 3, 4, 4, 7]])
TASK = 1  # of those of a multitask prompt
NEW = 6  # tokens that are generated
_SIZES = {
    "vocab_size": 144, "d_model": 12, "d_kv": 5, "d_ff": 16, "num_heads": 3,
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
}  # fmt: skip
# of 3 layers heads times size are not the width, which PEFT has to be told
BACKBONES = {
    "two layers": T5Config(num_layers=2, num_decoder_layers=2, **{**_SIZES, "d_kv": 4}),
    "three layers": T5Config(num_layers=3, num_decoder_layers=3, **_SIZES),
    "shallow decoder": T5Config(num_layers=3, num_decoder_layers=2, **_SIZES),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """A PEFT config, by the name of its class and its options, over one of the backbones."""

    config: str
    backbone: str = "three layers"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dtype: str = "float32"


_MULTITASK = {"num_tasks": 3, "num_ranks": 2}
CASES = {
    "prompt tuning": Case("PromptTuningConfig"),
    "prompt tuning, encoder alone": Case(
        "PromptTuningConfig", options={"num_transformer_submodules": 1}
    ),
    "p-tuning in bfloat16": Case(
        "PromptEncoderConfig", options={"encoder_hidden_size": 8}, dtype="bfloat16"
    ),
    "multitask": Case("MultitaskPromptTuningConfig", options=_MULTITASK),
    "multitask, encoder alone": Case(
        "MultitaskPromptTuningConfig", options={**_MULTITASK, "num_transformer_submodules": 1}
    ),
    "prefix, two layers": Case("PrefixTuningConfig", "two layers"),
    "prefix, three layers": Case(
        "PrefixTuningConfig", options={"token_dim": 15, "prefix_projection": True}
    ),
    "prefix, shallow decoder": Case(
        "PrefixTuningConfig", "shallow decoder", options={"token_dim": 15}
    ),
}


def write_backbone(directory: Path, name: str) -> Path:
    """The weights, drawn by numpy, and the tiny vocabulary."""
    config = BACKBONES[name]
    write_tokenizer(directory / "vocabulary")
    target = directory / name.replace(" ", "-")
    save_hf(
        target, tiny.make_params(config, seed=3), config, tokenizer_dir=directory / "vocabulary"
    )
    return target


def torch_backbone(directory: Path) -> Any:
    """`write_backbone`'s in transformers."""
    import torch
    import transformers

    torch.set_num_threads(1)
    model = transformers.T5ForConditionalGeneration.from_pretrained(directory)
    # transformers 5 scales decoder outputs, whatever an untied config says
    model.config.scale_decoder_outputs = False
    model.name_or_path = model.config._name_or_path = ""  # no path into PEFT's files
    return model.eval()


def make_adapter(case: Case, backbone: Path, target: Path) -> None:
    """An adapter of random values, saved by PEFT."""
    import peft
    import torch

    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(peft, case.config)(
            task_type="SEQ_2_SEQ_LM", num_virtual_tokens=LENGTH, **case.options
        )
        model = peft.get_peft_model(torch_backbone(backbone), config)
        for parameter in model.prompt_encoder.parameters():
            torch.nn.init.normal_(parameter)
        model.prompt_encoder.to(getattr(torch, case.dtype))
        model.save_pretrained(target)
    (target / "README.md").unlink()


def ask(adapter: Path, backbone: Path) -> tuple[dict[str, np.ndarray], dict[str, bytes]]:
    """PEFT's answers, and what it saves again.

    Returns: `forward`, its logits [2, T, V] but those of rows that it puts before the decoder's
      input; `first`, logits [2, V] of the first step of its generate; `ids`, the NEW tokens of
      that, which no end token ends. And its files.
    """
    import peft
    import torch

    inputs = torch.tensor(ENCODER_IDS)
    given = {"input_ids": inputs, "attention_mask": (inputs != 0).long()}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        model = peft.PeftModel.from_pretrained(torch_backbone(backbone), adapter).eval()
        if model.active_peft_config.peft_type == "MULTITASK_PROMPT_TUNING":
            given["task_ids"] = torch.full((2,), TASK)
            labels = torch.tensor(np.roll(DECODER_IDS, -1, axis=1))
            forward = model(**given, labels=labels).logits[:, -DECODER_IDS.shape[1] :]
        else:
            forward = model(**given, decoder_input_ids=torch.tensor(DECODER_IDS)).logits
        found = model.generate(
            **given, max_new_tokens=NEW, output_logits=True, return_dict_in_generate=True,
            eos_token_id=-1,
        )  # fmt: skip
        again = adapter.parent / f"{adapter.name} again"
        model.save_pretrained(again)
    saved = {path.name: path.read_bytes() for path in again.iterdir()}
    answers = {"forward": forward, "first": found.logits[0], "ids": found.sequences[:, 1:]}
    return {name: answer.numpy() for name, answer in answers.items()}, saved


def write_golden(label: str, target: Path) -> None:
    """A case's files as PEFT wrote them, at `target`."""
    target.mkdir(parents=True)
    with np.load(GOLDEN) as golden:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            (target / name).write_bytes(golden[f"{label}/{name}"].tobytes())


def golden_answers(label: str) -> dict[str, np.ndarray]:
    """What PEFT answers, as `ask` has it."""
    with np.load(GOLDEN) as golden:
        return {name: golden[f"{label}/{name}"] for name in ("forward", "first", "ids")}
