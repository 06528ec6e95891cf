"""Puts a pretrained backbone into the package under its name, or any elsewhere, with its card.

    python tools/mini/package.py --run runs/ladder/4m/tasks --data-card mini_data/data_card.json \\
        --scores runs/scale/figure1/scale.json --name jaxprompt-mini
    python tools/mini/package.py --run runs/ladder/4m/lm --data-card mini_data/data_card.json \\
        --name jaxprompt-ladder-4m --out backbones/ladder/4m/lm

What ships, jaxprompt-mini and jaxprompt-nano, has its place, its limit of size and its scores,
which `jaxprompt scale` measured. Checks size, loading and, where torch is installed, that
transformers computes the same logits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
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
from jaxprompt.measuring import machine
from jaxprompt.scale_points import read_points
from jaxprompt.t5.backbones import PACKAGED
from jaxprompt.t5.layers import abstract_params
from jaxprompt.t5.weights import TOKENIZER_FILES
from jaxprompt.trees import count
from jaxprompt.typing import UserError


@dataclasses.dataclass(frozen=True)
class Form:
    """How a backbone is packaged; None and () = as the run left it.

    Attributes:
      dtype: of the stored weights.
      left_out: files of the run's that do not travel.
      compact: JSON files that are written without white space and escapes.
      pictures: whether the runs' pictures of their losses travel.
      max_bytes: what all files together may come to, the card too.
    """

    dtype: str | None = None
    left_out: tuple[str, ...] = ()
    compact: tuple[str, ...] = ()
    pictures: bool = True
    max_bytes: int | None = None


OTHER = Form("bfloat16")
SHIPPED = {
    "jaxprompt-mini": Form("bfloat16", max_bytes=20_000_000),
    # tokenizer.json says all that spiece.model says, and is what is read where both are there
    "jaxprompt-nano": Form(
        "bfloat16",
        left_out=("spiece.model",),
        compact=("tokenizer.json",),
        pictures=False,
        max_bytes=2_000_000,
    ),
}
MAX_DIFFERENCE = 1e-4  # of a logit to torch's, in units of the largest


def package(
    run: Path,
    data_card: Path,
    scores: Path | None,
    out: Path,
    name: str = "jaxprompt-mini",
    quantize: str = "none",
    trained_on: str = "",
) -> Path:
    """Copies, checks and describes a run's backbone; `out` is replaced only if all is well.

    Args:
      scores: a `scale.json` with points of this backbone, which may be among others; None = the
        card says that nothing was measured.
      name: what the card calls the backbone; those of `SHIPPED` have a form and a limit of size.
      quantize: "int8" stores it so.
      trained_on: the machine of the pretraining, in words; empty = this one.
    Returns: `out`.
    Raises: UserError for a missing record, a backbone that is too large, does not load or computes
      something else in torch, or scores of other backbones alone.
    """
    points = [] if scores is None else read_points(scores)
    form = SHIPPED.get(name, OTHER)
    with replacing_directory(out) as place:
        if quantize != "none" or form.dtype:
            convert_backbone(str(run / "backbone"), str(place), dtype=form.dtype, quantize=quantize)
        else:
            for file in ("config.json", "model.safetensors", *TOKENIZER_FILES):
                if (run / "backbone" / file).is_file():
                    shutil.copyfile(run / "backbone" / file, place / file)
        for file in form.left_out:
            (place / file).unlink(missing_ok=True)
        for file in form.compact:
            _compact(place / file)
        backbone = load_backbone(str(place))
        own = [point for point in points if point.fingerprint == backbone.fingerprint]
        if scores is not None and not own:
            raise UserError(
                f"{scores} measured other backbones than {run / 'backbone'} in {form.dtype}: run "
                "`jaxprompt scale` over it"
            )
        runs = runs_of(run) if form.pictures else [without_picture(one) for one in runs_of(run)]
        for one in runs:
            if one.picture:
                shutil.copyfile(one.picture, place / one.picture_name)
        records = Records(
            name=name,
            runs=runs,
            data=_read_json(data_card, "prepare.py writes it"),
            points=own,
            architecture=backbone.config,
            parameters=count(abstract_params(backbone.config)),
            size=_bytes_in(place),
            fingerprint=backbone.fingerprint,
            stored=quantize if quantize != "none" else form.dtype or runs[-1].config.export_dtype,
            difference=torch_difference(backbone),
            trained_on=trained_on or machine(),
        )
        (place / "README.md").write_text(card(records), encoding="utf-8")
        if form.max_bytes is not None and _bytes_in(place) > form.max_bytes:
            raise UserError(
                f"{run / 'backbone'} is {_bytes_in(place) / 1e6:.2f} MB with its card, {name} may "
                f"be {form.max_bytes / 1e6:.0f}: give --quantize int8, or pretrain a smaller one"
            )
    return out


def runs_of(run: Path) -> list[Trained]:
    """A pretraining run and the runs it began from, the first of them first."""
    config = load_config(run / "config.yaml", (), PretrainConfig)
    metrics, picture = run / "metrics.jsonl", run / "plots" / "run.png"
    drawn = picture if picture.is_file() else None
    own = Trained(config, _read_metrics(metrics), metrics.stat().st_mtime, drawn)
    before = Path(config.backbone.name).parent
    if config.model is not None or not (before / "config.yaml").is_file():
        return [own]
    return [*runs_of(before), own]


def without_picture(run: Trained) -> Trained:
    """The same run, whose picture does not travel."""
    return dataclasses.replace(run, picture=None)


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


def _compact(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path.write_text(text, encoding="utf-8")


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


def _place_of(name: str) -> Path:
    if name not in SHIPPED:
        raise UserError(f"{name} is not one that ships ({', '.join(SHIPPED)}): give --out")
    return PACKAGED[name].directory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="output_dir of the pretraining")
    parser.add_argument("--data-card", type=Path, required=True, help="what prepare.py wrote")
    parser.add_argument("--scores", type=Path, help="scale.json that `jaxprompt scale` wrote")
    parser.add_argument(
        "--out", type=Path, help="a directory; without it the place in the package, by the name"
    )
    parser.add_argument("--name", default="jaxprompt-mini", help="what the card calls it")
    parser.add_argument("--quantize", choices=("none", "int8"), default="none")
    parser.add_argument(
        "--trained-on", default="", help="machine of the pretraining, for the card (this one)"
    )
    args = parser.parse_args()
    try:
        out = args.out or _place_of(args.name)
        shipped = {PACKAGED[name].directory.resolve() for name in SHIPPED}
        if args.scores is None and out.resolve() in shipped:
            raise UserError(
                "what ships has its scores in its card: give --scores, or another --out"
            )
        place = package(
            args.run, args.data_card, args.scores, out, args.name, args.quantize, args.trained_on
        )
    except UserError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{place}: {_bytes_in(place) / 1e6:.2f} MB", file=sys.stderr)


if __name__ == "__main__":
    main()
