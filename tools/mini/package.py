"""Puts a pretrained backbone into the package as jaxprompt-mini, with its model card.

    python tools/mini/package.py --run runs/mini --data-card mini_data/data_card.json \\
        --report runs/mini-evaluation/report.json

Checks size, loading and, where torch is installed, that transformers computes the same logits.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
from card import Records, card

import jaxprompt
from jaxprompt.backbone import Backbone, load_backbone
from jaxprompt.config import PretrainConfig, load_config
from jaxprompt.files import replacing_directory
from jaxprompt.t5.weights import TOKENIZER_FILES
from jaxprompt.trees import count
from jaxprompt.typing import UserError

ASSETS = Path(jaxprompt.__file__).parent / "assets" / "mini"
MAX_BYTES = 20_000_000
MAX_DIFFERENCE = 1e-4  # of a logit to torch's, in units of the largest


def package(run: Path, data_card: Path, report: Path, out: Path) -> Path:
    """Copies, checks and describes a run's backbone; `out` is replaced only if all is well.

    Returns: `out`.
    Raises: UserError for a missing record, a backbone that is too large, does not load or computes
      something else in torch, or a report of another backbone.
    """
    measured = _read_json(report, "evaluate.py writes it")
    with replacing_directory(out) as place:
        for name in ("config.json", "model.safetensors", *TOKENIZER_FILES):
            if (run / "backbone" / name).is_file():
                shutil.copyfile(run / "backbone" / name, place / name)
        backbone = load_backbone(str(place))
        if measured["backbone"]["fingerprint"] != backbone.fingerprint:
            raise UserError(
                f"{report} measured another backbone than {run / 'backbone'}: run evaluate.py again"
            )
        difference = torch_difference(backbone)
        records = Records(
            config=load_config(run / "config.yaml", (), PretrainConfig),
            metrics=_read_metrics(run / "metrics.jsonl"),
            data=_read_json(data_card, "prepare.py writes it"),
            report=measured,
            architecture=backbone.config,
            parameters=count(backbone.params),
            size=_bytes_in(place),
            fingerprint=backbone.fingerprint,
            difference=difference,
            date=(run / "metrics.jsonl").stat().st_mtime,
        )
        (place / "README.md").write_text(card(records), encoding="utf-8")
        if _bytes_in(place) > MAX_BYTES:
            raise UserError(
                f"{run / 'backbone'} is {_bytes_in(place) / 1e6:.1f} MB with its card, the package "
                f"takes {MAX_BYTES / 1e6:.0f}: pretrain with export_dtype: bfloat16, or smaller"
            )
    return out


def torch_difference(backbone: Backbone) -> float | None:
    """Largest distance of our logits to transformers' on random ids, in units of the largest logit.

    Returns: None if torch is not installed.
    Raises: UserError if they differ.
    """
    try:
        import torch
        from transformers import T5ForConditionalGeneration
    except ImportError:
        return None
    draw = np.random.default_rng(0)
    encoder_BS = draw.integers(3, backbone.tokenizer.size, (3, 17))
    decoder_BT = draw.integers(3, backbone.tokenizer.size, (3, 5))
    encoder_BS[1, 9:] = backbone.config.pad_id
    decoder_BT[:, 0] = backbone.config.decoder_start_id
    model = T5ForConditionalGeneration.from_pretrained(backbone.directory, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(
            input_ids=torch.from_numpy(encoder_BS),
            attention_mask=torch.from_numpy(encoder_BS != backbone.config.pad_id),
            decoder_input_ids=torch.from_numpy(decoder_BT),
        ).logits.numpy()
    ours = np.asarray(jaxprompt.logits(backbone, None, encoder_BS, decoder_BT))
    difference = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not difference <= MAX_DIFFERENCE:
        raise UserError(
            f"{backbone.directory}: logits differ from torch's by {difference:.1e} of the largest"
        )
    return difference


def _read_json(path: Path, hint: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {hint}") from error


def _read_metrics(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    return [json.loads(line) for line in lines]


def _bytes_in(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.iterdir())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the pretraining")
    parser.add_argument("--data-card", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--report", type=Path, required=True, help="what evaluate.py wrote")
    parser.add_argument("--out", type=Path, default=ASSETS)
    args = parser.parse_args()
    try:
        place = package(args.run, args.data_card, args.report, args.out)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{place}: {_bytes_in(place) / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
