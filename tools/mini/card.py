"""Writes the card of a backbone of ours from what its runs, its data and its scores recorded.

Called by `package.py`. Every number comes from a file; only names, licences and sentences stand
here.
"""

from __future__ import annotations

import dataclasses
import statistics
import textwrap
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxprompt.config import PretrainConfig
from jaxprompt.data.pretraining import MixtureEntry
from jaxprompt.optim import resolve
from jaxprompt.scale_points import Point, rows_of
from jaxprompt.t5.config import T5Config
from jaxprompt.tables import markdown_table

# what data_card.json calls it -> what it is, and the terms it comes under
TEXTS = {
    "imdb": (
        "IMDB film reviews, training and unlabelled part (Maas et al. 2011)",
        "none stated; copyright of the reviewers, published for research",
    ),
    "wikipedia": ("English Wikipedia, a sample of articles", "CC BY-SA"),
    "novels": ("English novels", "public domain"),
}
LABELLED = {
    "squad": ("SQuAD 1.1, a part of the training set (Rajpurkar et al. 2016)", "CC BY-SA 4.0"),
    "copa": ("COPA, training set from SuperGLUE (Roemmele et al. 2011)", "BSD 2-clause"),
    "cb": (
        "CommitmentBank, training set from SuperGLUE (de Marneffe et al. 2019)",
        "none stated; published for research",
    ),
}

_FRONT = """\
---
language: en
license: other
library_name: jaxprompt
tags: [t5, prompt-tuning]
---
# {name}"""
_ABOUT = """
A small English {kind} that the jaxprompt project pretrained itself, with its own vocabulary,
{purpose}. It is there to be prompted and looked into, not to be relied on. Its layout is the
ordinary Hugging Face one: {torch}.

This page is written by `tools/mini/package.py` from the records of {records}."""
_KINDS = {  # by whether the embeddings are tied
    False: "T5 1.1",
    True: "T5 1.1, but for T5 1.0's tied embeddings,",
}
_OUTPUTS = {  # by whether it is tied and whether its input is scaled
    (False, False): "its own",
    (True, False): "the embedding table",
    (True, True): "the embedding table; its input is divided by the width's root",
}
_PURPOSES = {
    "jaxprompt-mini": "so that the quickstart, the tests and the documentation run on a machine "
    "without a network",
    "jaxprompt-nano": "so that tests have a backbone that is loaded and compiled in no time",
}
_RUNG = "a rung of the ladder that shows what changes as a backbone grows (docs/scale.md)"
_ANEW = {
    "jaxprompt-mini": "the run; `make mini` makes data, weights, scores and this page anew",
    "jaxprompt-nano": "the run; `make nano` makes data, weights, scores and this page anew",
}
_SCORES = """
Lines of `configs/scale/figure1.yaml`, as `jaxprompt scale scale/figure1` measures them: prompts of
20 slots over the frozen backbone, all of its weights tuned, and four examples in words before every
input. A score is {metrics}, from one evaluation after the last step: no step, seed or run was
chosen by it. ± is the standard deviation over {seeds} seeds."""
_MEASURED = """
Measured on {machine}; {date}."""
# task -> what was known of its evaluation set; told where it was measured
_IN_SIGHT = {
    "sst2": """
The SST-2 development set was in sight while the data was designed: the n-gram model that labels
pieces of IMDB reviews reaches {teacher:.1f} % there, and its kind and settings were chosen knowing
such numbers. No SST-2 sentence was trained on.""",
    "e2e": """
E2E is scored on the first 200 inputs of its test set in an order by digest, against all sentences
of each.""",
}
_LIMITS = """
English only. It knows little of the world, {instructions}, and writes no coherent text of its own.
{labels} Inputs of more than {longest} tokens were never seen in training."""
_LABELS = """
Its topic and sentiment labels come from word lists and an n-gram model, so it repeats their
mistakes and the reviewers' prejudices."""
_TEXTS_ALONE = "It repeats its texts' prejudices."


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a pretraining run left.

    Attributes:
      config: the run's.
      metrics: the lines of its metrics.jsonl.
      date: when the last of them were written, seconds since 1970.
      picture: its losses, if they are to be shown.
    """

    config: PretrainConfig
    metrics: Sequence[Mapping[str, Any]]
    date: float
    picture: Path | None = None

    @property
    def name(self) -> str:
        """Of its directory."""
        return Path(self.config.output_dir).name

    @property
    def picture_name(self) -> str:
        """Of its picture beside the card."""
        return f"loss-{self.name}.png"


@dataclasses.dataclass(frozen=True)
class Records:
    """All a card is made of.

    Attributes:
      name: of the backbone.
      runs: the pretraining runs, each from the weights of the one before.
      data: data_card.json.
      points: what was measured of it; empty = nothing.
      architecture, parameters, size, fingerprint: of the packaged backbone; size in bytes.
      stored: how its weights are stored.
      difference: largest distance to torch's logits, None if torch was not there.
      trained_on: the machine of the pretraining, in words.
    """

    name: str
    runs: Sequence[Trained]
    data: Mapping[str, Any]
    points: Sequence[Point]
    architecture: T5Config
    parameters: int
    size: int
    fingerprint: str
    stored: str
    difference: float | None
    trained_on: str

    @property
    def supervised(self) -> bool:
        """Whether any of the runs saw the supervised tasks."""
        return any(entry.objective == "supervised" for entry in self.entries)

    @property
    def entries(self) -> list[MixtureEntry]:
        """All that was trained on."""
        return [entry for run in self.runs for entry in run.config.mixture.entries]


def card(records: Records) -> str:
    """The README.md of the packaged backbone."""
    torch = "`transformers` loads it too"
    if records.stored == "int8":
        torch = "`transformers` loads what `jaxprompt convert --quantize none` makes of its int8"
    if records.difference is not None:
        torch += f", with the same logits to {records.difference:.0e} of the largest"
    about = _ABOUT.format(
        purpose=_PURPOSES.get(records.name, _RUNG),
        torch=torch,
        kind=_KINDS[records.architecture.tie_word_embeddings],
        records=_ANEW.get(records.name, "its runs"),
    )
    limits = _LIMITS.format(
        instructions="follows instructions only of the kinds it was trained on"
        if records.supervised
        else "follows no instructions",
        labels=_LABELS if records.supervised else _TEXTS_ALONE,
        longest=max(entry.max_input_length for entry in records.entries),
    )
    sections = [
        _FRONT.format(name=records.name),
        _prose(about),
        _architecture(records),
        *_training(records),
        _data(records.data, records.supervised),
        _kept_out(records.data),
        _scores(records),
        "## Limits",
        _prose(limits),
    ]
    return "\n\n".join(sections) + "\n"


def _architecture(records: Records) -> str:
    shape = records.architecture
    return _markdown(
        ("", ""),
        [
            ("parameters", f"{records.parameters:,}"),
            ("layers", f"{shape.num_layers} encoder, {shape.num_decoder_layers} decoder"),
            ("width", f"{shape.d_model}, mlp {shape.d_ff} ({shape.activation}, gated)"),
            ("heads", f"{shape.num_heads} of {shape.d_kv}"),
            ("embedding rows", f"{shape.vocab_size:,}"),
            ("output layer", _OUTPUTS[shape.tie_word_embeddings, shape.scale_decoder_outputs]),
            ("vocabulary", f"{records.data['vocab_size']:,} pieces and sentinels, SentencePiece"),
            ("files", f"{records.stored}, {records.size / 1e6:.1f} MB in all"),
            ("fingerprint", f"`{records.fingerprint}`"),
        ],
    )


def _training(records: Records) -> list[str]:
    """A section for each run; of several each has the name of its directory."""
    sections = []
    for run in records.runs:
        name = f": {run.name}" if len(records.runs) > 1 else ""
        parts = [f"## Training{name}", _run_table(run, records.trained_on)]
        if run.picture:
            parts.append(f"![loss of {run.name} over its steps]({run.picture_name})")
        sections.append("\n\n".join(parts))
    return sections


def _run_table(run: Trained, trained_on: str) -> str:
    config, mixture = run.config, run.config.mixture
    steps, windows = exported_step(run.metrics), training_records(run.metrics)
    recipe = resolve(config.optim)
    examples = statistics.mean(window["examples"] for window in windows)
    targets = statistics.mean(window["tokens"] for window in windows)
    speed = statistics.median(window["examples_per_second"] for window in windows)
    recent = windows[-max(1, len(windows) // 20) :]
    shares = ", ".join(
        f"{entry.objective.replace('_', ' ')} {entry.weight / total:.0%}"
        for total in (sum(entry.weight for entry in mixture.entries),)
        for entry in mixture.entries
    )
    planned = config.train.steps or recipe.steps
    rows = [
        ("steps", f"{steps:,}" + ("" if steps == planned else f" of {planned:,} planned")),
        (
            "a step",
            f"{mixture.batch_size} packed rows of {mixture.row_input_length} + "
            f"{mixture.row_target_length} positions, {examples:.0f} examples on average",
        ),
        ("examples", f"{steps * examples:,.0f}"),
        ("input positions", f"{steps * mixture.batch_size * mixture.row_input_length:,}"),
        ("target tokens", f"{steps * targets:,.0f}"),
        ("mixture, by examples", shares),
        (
            "optimizer",
            f"{recipe.optimizer}, rate {recipe.learning_rate:g}, {recipe.schedule}, loss averaged "
            f"by {config.train.loss_by}",
        ),
        ("loss", f"{statistics.mean(window['loss'] for window in recent):.3f} at the end"),
        *_validation(run.metrics, steps),
        ("time", f"{steps * examples / speed / 3600:.1f} hours at {speed:.0f} examples/s"),
        ("machine", trained_on),
        ("ended", time.strftime("%Y-%m-%d", time.gmtime(run.date))),
    ]
    return _markdown(("", ""), rows)


def exported_step(metrics: Sequence[Mapping[str, Any]]) -> int:
    """The step of the last evaluation, which is when the backbone was written."""
    return max(line["step"] for line in metrics if any(name.startswith("eval/") for name in line))


def training_records(metrics: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The training records up to the step that was exported."""
    last = exported_step(metrics)
    return [line for line in metrics if "loss" in line and line["step"] <= last]


def _validation(metrics: Sequence[Mapping[str, Any]], step: int) -> list[tuple[str, str]]:
    values = {
        name: value for line in metrics if line["step"] == step for name, value in line.items()
    }
    rows = []
    for name, value in values.items():
        if name.startswith("eval/") and name.endswith("/loss"):
            objective = name.removeprefix("eval/").removesuffix("/loss")
            exact = values[f"eval/{objective}/exact_match"]
            accuracy = values[f"eval/{objective}/accuracy"]
            told = f"loss {value:.3f}, tokens right {accuracy:.1f} %, whole targets {exact:.1f} %"
            rows.append((f"held out, {objective.replace('_', ' ')}", told))
    return rows


def _data(data: Mapping[str, Any], with_tasks: bool) -> str:
    text = data["files"]["text.jsonl"]
    rows = [
        (
            *TEXTS[name],
            f"{text['rows_by_source'][name]:,} passages",
            f"{text['tokens_by_source'][name]:,}",
        )
        for name in text["rows_by_source"]
    ]
    if with_tasks:
        rows += _task_rows(data["files"]["supervised.jsonl"])
    repeated = "Rows of labelled sets repeat their examples under several wordings."
    about = f"""
    {repeated if with_tasks else ""} Tokens are those of the inputs. None is restricted to
    non-commercial use. The film reviews, the larger part, state no terms and were published for
    research: the weights are published for research and teaching."""
    table = _markdown(("source", "terms", "rows", "tokens"), rows)
    return "\n\n".join(["## Data", _prose(about), table])


def _task_rows(supervised: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """The tasks made of the texts in one row, then each labelled set."""
    counts, tokens = supervised["rows_by_task"], supervised["tokens_by_task"]
    made = [name for name in counts if name not in LABELLED]
    told = f"Tasks made from these texts: {', '.join(made).replace('_', ' ')}"
    together = (sum(part[name] for name in made) for part in (counts, tokens))
    rows, of_inputs = (f"{total:,}" for total in together)
    return [
        (told, "as the texts", f"{rows} rows", of_inputs),
        *(
            (*LABELLED[name], f"{counts[name]:,} rows", f"{tokens[name]:,}")
            for name in counts
            if name in LABELLED
        ),
    ]


def _kept_out(data: Mapping[str, Any]) -> str:
    about = """
    No text of SST-2, RTE, BoolQ, MRPC, CoLA, QQP, E2E or XQuAD, no IMDB test review and nothing of
    the demo set was trained on. Documents that hold a text of an evaluation set (as a whole from 6
    words on, or any 13 words of it in a row) were dropped whole:"""
    dropped = [(reason, f"{count:,}") for reason, count in data["dropped"].items()]
    return "\n\n".join(["## Kept out", _prose(about), _markdown(("document", "dropped"), dropped)])


def _scores(records: Records) -> str:
    points = records.points
    if not points:
        return "## Scores\n\nNone was measured."
    tasks: dict[str, str] = {}  # what a score is -> the tasks it is of
    for task, metrics in {point.task: list(point.metrics) for point in points}.items():
        name = f"{'the mean of ' if len(metrics) > 1 else ''}{' and '.join(metrics)}"
        tasks[name] = f"{tasks[name]}, {task}" if name in tasks else task
    told = _SCORES.format(
        metrics=", ".join(f"{name} ({of})" for name, of in tasks.items()),
        seeds=max(len(point.scores) + point.diverged for point in points),
    )
    measured = _MEASURED.format(
        machine=" and ".join(dict.fromkeys(point.machine for point in points)),
        date=max(point.date for point in points),
    )
    in_sight = "".join(
        text for task, text in _IN_SIGHT.items() if any(point.task == task for point in points)
    ).format(teacher=records.data["teacher_report"]["sst2_dev_accuracy"])
    table = markdown_table(*rows_of(points))
    return "\n\n".join(["## Scores", _prose(told), table, _prose(f"{measured}\n\n{in_sight}")])


def _prose(text: str) -> str:
    """Paragraphs in lines of at most 100 characters."""
    return "\n\n".join(
        textwrap.fill(" ".join(part.split()), 100, break_long_words=False, break_on_hyphens=False)
        for part in text.strip().split("\n\n")
    )


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
