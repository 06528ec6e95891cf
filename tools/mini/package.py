"""Puts a pretrained backbone into the package as jaxprompt-mini, or any elsewhere, with its card.

    python tools/mini/package.py --run runs/mini --data-card mini_data/data_card.json \\
        --report runs/mini-evaluation/report.json
    python tools/mini/package.py --run runs/ladder/4m/lm --data-card mini_data/data_card.json \\
        --name jaxprompt-4m-lm --out backbones/4m-lm

Checks size, loading and, where torch is installed, that transformers computes the same logits.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from card import Records, Trained, card

import jaxprompt
from jaxprompt.backbone import Backbone, load_backbone
from jaxprompt.config import PretrainConfig, load_config
from jaxprompt.convert import convert_backbone
from jaxprompt.files import replacing_directory
from jaxprompt.t5.layers import abstract_params
from jaxprompt.t5.weights import TOKENIZER_FILES
from jaxprompt.trees import count
from jaxprompt.typing import UserError

ASSETS = Path(jaxprompt.__file__).parent / "assets" / "mini"
# name -> which files are counted and what they may come to in bytes; nano has mini's vocabulary
MAX_BYTES = {"jaxprompt-mini": ("*", 20_000_000), "jaxprompt-nano": ("*.safetensors", 2_000_000)}
MAX_DIFFERENCE = 1e-4  # of a logit to torch's, in units of the largest


def package(
    run: Path,
    data_card: Path,
    report: Path | None,
    out: Path,
    name: str = "jaxprompt-mini",
    quantize: str = "none",
) -> Path:
    """Copies, checks and describes a run's backbone; `out` is replaced only if all is well.

    Args:
      report: None = the card says that nothing was measured.
      name: what the card calls the backbone; some names have a limit of size.
      quantize: "int8" stores it so.
    Returns: `out`.
    Raises: UserError for a missing record, a backbone that is too large, does not load or computes
      something else in torch, or a report of another backbone.
    """
    measured = None if report is None else _read_json(report, "evaluate.py writes it")
    with replacing_directory(out) as place:
        if quantize != "none":
            convert_backbone(str(run / "backbone"), str(place), quantize=quantize)
        else:
            for file in ("config.json", "model.safetensors", *TOKENIZER_FILES):
                if (run / "backbone" / file).is_file():
                    shutil.copyfile(run / "backbone" / file, place / file)
        backbone = load_backbone(str(place))
        if measured and measured["backbone"]["fingerprint"] != backbone.fingerprint:
            raise UserError(
                f"{report} measured another backbone than {run / 'backbone'}: run evaluate.py again"
            )
        runs = runs_of(run)
        records = Records(
            name=name,
            runs=runs,
            data=_read_json(data_card, "prepare.py writes it"),
            report=measured,
            architecture=backbone.config,
            parameters=count(abstract_params(backbone.config)),
            size=_bytes_in(place),
            fingerprint=backbone.fingerprint,
            stored=runs[-1].config.export_dtype if quantize == "none" else quantize,
            difference=torch_difference(backbone),
        )
        (place / "README.md").write_text(card(records), encoding="utf-8")
        files, most = MAX_BYTES.get(name, ("*", math.inf))
        if _bytes_in(place, files) > most:
            raise UserError(
                f"{run / 'backbone'} is {_bytes_in(place, files) / 1e6:.2f} MB of {files} with its "
                f"card, {name} may be {most / 1e6:.0f}: pretrain with export_dtype: bfloat16, "
                "--quantize int8, or smaller"
            )
    return out


def runs_of(run: Path) -> list[Trained]:
    """A pretraining run and the runs it began from, the first of them first."""
    config = load_config(run / "config.yaml", (), PretrainConfig)
    metrics = run / "metrics.jsonl"
    own = Trained(config, _read_metrics(metrics), metrics.stat().st_mtime)
    before = Path(config.backbone.name).parent
    if config.model is not None or not (before / "config.yaml").is_file():
        return [own]
    return [*runs_of(before), own]


def torch_difference(backbone: Backbone) -> float | None:
    """Largest distance of our logits to transformers' on random ids, in units of the largest logit.

    Of quantised weights torch gets the floats that they stand for.

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
    with tempfile.TemporaryDirectory() as floats:
        convert_backbone(str(backbone.directory), floats, dtype="float32", quantize="none")
        model = T5ForConditionalGeneration.from_pretrained(floats, dtype=torch.float32)
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


def _bytes_in(directory: Path, files: str = "*") -> int:
    return sum(path.stat().st_size for path in directory.glob(files))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the pretraining")
    parser.add_argument("--data-card", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--report", type=Path, help="what evaluate.py wrote")
    parser.add_argument("--out", type=Path, default=ASSETS)
    parser.add_argument("--name", default="jaxprompt-mini", help="what the card calls it")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    args = parser.parse_args()
    try:
        if args.report is None and args.out == ASSETS:
            raise UserError(
                "what ships has its scores in its card: give --report, or another --out"
            )
        place = package(args.run, args.data_card, args.report, args.out, args.name, args.quantize)
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{place}: {_bytes_in(place) / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
