"""Makes peft.npz: adapters that PEFT wrote and what it answers with them, for the tests of import.

Run it with torch and PEFT installed, `PYTHONPATH=tests python tests/golden/make_peft_golden.py`,
when a case or a backbone of `tests/peft_cases.py` is added or changed.
"""

import tempfile
from pathlib import Path

import numpy as np
import peft_cases


def make() -> None:
    arrays = {}
    with tempfile.TemporaryDirectory() as directory:
        backbones = {
            name: peft_cases.write_backbone(Path(directory), name) for name in peft_cases.BACKBONES
        }
        for label, case in peft_cases.CASES.items():
            adapter = Path(directory, label)
            peft_cases.make_adapter(case, backbones[case.backbone], adapter)
            answers, again = peft_cases.ask(adapter, backbones[case.backbone])
            arrays |= {f"{label}/{name}": answer for name, answer in answers.items()}
            for name in ("adapter_config.json", "adapter_model.safetensors"):
                content = (adapter / name).read_bytes()
                # a BF16 file is read into float32 parameters, so PEFT saves another
                assert case.dtype != "float32" or again[name] == content, (label, name)
                arrays[f"{label}/{name}"] = np.frombuffer(content, np.uint8)
    np.savez_compressed(peft_cases.GOLDEN, **arrays)


if __name__ == "__main__":
    make()
