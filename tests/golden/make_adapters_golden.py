"""Makes adapters.npz for `test_method_oracles.py`: prefix tuning in the library `adapters`.

`adapters` pins a transformers of its own, so it is not among what tests install. With adapters
1.3.0, transformers 4.57.6 and torch beside jaxprompt's other dependencies, run
`PYTHONPATH=tests python tests/golden/make_adapters_golden.py`.

The backbone's relative biases are zero: with a prefix of P keys `adapters` 1.3.0 takes the bias of
every text position P places too far (the keys count from the prefix on, the queries do not), which
is not the T5 that was trained.
"""

import tempfile
from pathlib import Path

import adapters
import numpy as np
import peft_cases
import tiny
import torch

from jaxprompt.t5.weights import save_hf


def make() -> None:
    config = peft_cases.BACKBONES["shallow decoder"]
    with tempfile.TemporaryDirectory() as directory:
        save_hf(directory, tiny.make_params(config, seed=3), config)
        model = peft_cases.torch_backbone(Path(directory))
    for name, weight in model.named_parameters():
        if "relative_attention_bias" in name:
            torch.nn.init.zeros_(weight)
    adapters.init(model)
    options = {"prefix_length": peft_cases.LENGTH, "bottleneck_size": 7}
    model.add_adapter("prefix", config=adapters.PrefixTuningConfig(**options))
    model.set_active_adapters("prefix")
    torch.manual_seed(0)
    trained = {name: weight for name, weight in model.named_parameters() if "prefix" in name}
    for weight in trained.values():
        torch.nn.init.normal_(weight)
    inputs = torch.tensor(peft_cases.ENCODER_IDS)
    with torch.no_grad():
        logits = model.eval()(
            input_ids=inputs,
            attention_mask=(inputs != 0).long(),
            decoder_input_ids=torch.tensor(peft_cases.DECODER_IDS),
        ).logits
    # "....prefix_tunings.prefix.encoder_prefix.wte.weight" -> "encoder_prefix.wte.weight"
    arrays = {".".join(name.split(".")[-4:]): weight for name, weight in trained.items()}
    arrays = {name.removeprefix("prefix."): weight for name, weight in arrays.items()}
    print({name: tuple(weight.shape) for name, weight in arrays.items()})
    kept = {name: weight.detach().numpy() for name, weight in arrays.items()}
    np.savez_compressed(Path(__file__).parent / "adapters.npz", logits=logits.numpy(), **kept)


if __name__ == "__main__":
    make()
