"""`jaxprompt transfer`: which trained prompts a new one should begin from; a prompt for another T5.

The first is SPoT's retrieval over a library of prompts, the second prompt recycling. Reads top to
bottom: the command, libraries, recycling.
"""

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxprompt.artifact import (
    CONFIG_NAME,
    BackboneIdentity,
    PromptArtifact,
    check_backbone,
    load_artifact,
    save_artifact,
)
from jaxprompt.data.tokenizer import Tokenizer, load_tokenizer
from jaxprompt.plots import write_similarity_plot
from jaxprompt.prompts.recycling import RECYCLERS, SKIPPED, WORDS
from jaxprompt.prompts.similarity import SIMILARITIES, joints, weighted_mean
from jaxprompt.t5.backbones import fingerprint, read_config, resolve_backbone
from jaxprompt.t5.weights import read_embedding
from jaxprompt.tables import table
from jaxprompt.typing import UserError


def main(args: argparse.Namespace) -> None:
    """The command: `transfer --library DIR [--to PROMPT]`, or `transfer PROMPT OUT --recycle M`."""
    if bool(args.library) == bool(args.recycle):
        raise UserError(
            "transfer wants either --library DIR, a directory of prompts to compare, or "
            "PROMPT OUT --recycle METHOD --to-backbone B, a prompt to translate"
        )
    if args.recycle:
        _recycle(args)
        return
    if args.prompt:
        raise UserError(f"{args.prompt}: --library takes no PROMPT; compare with --to PROMPT")
    if args.output and not args.to:
        raise UserError("--output is for what --to PROMPT should begin from; name that prompt")
    library = read_library(args.library)
    told = _ranked(args, library) if args.to else _compared(library)
    starts = _starts(args, library, told) if args.output else {}
    for place, start in starts.items():
        save_artifact(place, start)
    _print(told, args.json)
    if starts:
        key = f"method.init_path={args.output}"
        if len(starts) > 1:
            key = f"'sweep.method.init_path=[{','.join(starts)}]'"
        print(f"jaxprompt: begin from it with method.init=prompt {key}", file=sys.stderr)
    if args.plot:
        print(f"jaxprompt: {_picture(args, library)}", file=sys.stderr)


def _print(told: Sequence[Mapping[str, Any]], as_json: bool) -> None:
    """Lines of names and similarities, these with four digits."""
    for line in told if as_json else ():
        shown = {key: round(v, 4) if isinstance(v, float) else v for key, v in line.items()}
        print(json.dumps(shown, ensure_ascii=False))
    if not as_json:
        rows = [[f"{v:.4f}" if isinstance(v, float) else v for v in line.values()] for line in told]
        print(table(rows, header=list(told[0])))


# ---- libraries -----------------------------------------------------------------------------------


def read_library(directory: str) -> dict[str, PromptArtifact]:
    """The soft prompts in a directory, by name: artifacts, or runs with a `best` one.

    Raises: UserError if there are none, or they cannot be compared: other methods, backbones or
      lengths.
    """
    place = Path(directory)
    if not place.is_dir():
        raise UserError(f"there is no directory {directory}; a library is a directory of prompts")
    found: dict[str, PromptArtifact] = {}
    for entry in sorted(place.iterdir()):
        for artifact in (entry, entry / "best"):
            if (artifact / CONFIG_NAME).is_file():
                found[entry.name] = load_artifact(artifact)
                break
    if not found:
        raise UserError(
            f"{directory} holds no prompt: a library is a directory of prompt artifacts, or of "
            "runs with a best one"
        )
    first, *others = found.values()
    for prompt in (first, *others):
        _check_alike(first, prompt)
    return found


def similarities(
    prompt: PromptArtifact, library: Mapping[str, PromptArtifact]
) -> dict[str, dict[str, float]]:
    """By name, how like a prompt those of a library are, in each of `SIMILARITIES`.

    Raises: UserError if it cannot be compared with them.
    """
    for other in library.values():
        _check_alike(other, prompt)
    return {
        name: {kind: like(_rows(prompt), _rows(other)) for kind, like in SIMILARITIES.items()}
        for name, other in library.items()
    }


def combined(
    target: PromptArtifact, chosen: Mapping[str, PromptArtifact], scores: Sequence[float]
) -> PromptArtifact:
    """What a prompt for the target's task begins from: the chosen ones' mean by similarity.

    Raises: UserError for one that is not similar at all.
    """
    if min(scores) <= 0:
        name = list(chosen)[int(np.argmin(scores))]
        raise UserError(
            f"prompt {name} has similarity {min(scores):.3f}, and a weighted average takes those "
            "above 0; choose fewer with --top"
        )
    weights = np.asarray(scores) / np.sum(scores)
    return dataclasses.replace(
        target,
        values={"prompt": weighted_mean([_rows(one) for one in chosen.values()], scores)},
        training={
            "transfer": "spot",
            "to": target.path,
            "sources": {
                one.path: round(float(weight), 6)
                for one, weight in zip(chosen.values(), weights, strict=True)
            },
        },
    )


def _check_alike(first: PromptArtifact, prompt: PromptArtifact) -> None:
    """Raises: UserError if two prompts cannot be compared slot by slot."""
    if prompt.method["name"] != "soft":
        raise UserError(
            f"prompt {prompt.path} is of method {prompt.method['name']}, whose rows are not the "
            "whole prompt; only soft prompts, and those of methods that fold, can be compared"
        )
    if prompt.backbone.fingerprint != first.backbone.fingerprint:
        raise UserError(
            f"prompt {prompt.path} is of backbone {prompt.backbone.name or 'unknown'}, prompt "
            f"{first.path} of {first.backbone.name or 'unknown'}; only prompts of one backbone can "
            "be compared"
        )
    if _rows(prompt).shape != _rows(first).shape:
        sizes = [" x ".join(map(str, _rows(one).shape)) for one in (prompt, first)]
        raise UserError(
            f"prompt {prompt.path} is {sizes[0]}, prompt {first.path} {sizes[1]}; only prompts of "
            "one length can be compared"
        )


def _rows(prompt: PromptArtifact) -> np.ndarray:
    return prompt.values["prompt"]


def _ranked(args: argparse.Namespace, library: dict[str, PromptArtifact]) -> list[dict[str, Any]]:
    """A line for each prompt of the library, the likest first; the target itself left out."""
    target = load_artifact(args.to)
    for name in [name for name, one in library.items() if _same_place(one.path, args.to)]:
        del library[name]
    if not library:
        raise UserError(
            f"{args.library} holds no prompt but {args.to}; there is none to begin from"
        )
    found = similarities(target, library)
    names = sorted(found, key=lambda name: -found[name][args.similarity])
    return [
        {"prompt": name, "rank": rank + 1, "task": library[name].task.get("name", ""),
         **found[name]}
        for rank, name in enumerate(names)
    ]  # fmt: skip


def _compared(library: Mapping[str, PromptArtifact]) -> list[dict[str, Any]]:
    """A line for each pair of the library."""
    if len(library) == 1:
        raise UserError("the library holds a single prompt; compare it with another by --to PROMPT")
    return [
        {"prompt": a, "and": b, **{
            kind: like(_rows(library[a]), _rows(library[b]))
            for kind, like in SIMILARITIES.items()
        }}
        for a, b in itertools.combinations(library, 2)
    ]  # fmt: skip


def _starts(
    args: argparse.Namespace, library: Mapping[str, PromptArtifact], told: Sequence[dict[str, Any]]
) -> dict[str, PromptArtifact]:
    """By place SPoT's "top-k weighted average", or "best of top-k": each of them, to be tried."""
    if args.top > len(told):
        raise UserError(
            f"--top is {args.top}, the library holds {len(told)} prompts to choose from"
        )
    target, best = load_artifact(args.to), told[: args.top]
    chosen = {line["prompt"]: library[line["prompt"]] for line in best}
    if args.combine == "average":
        return {args.output: combined(target, chosen, [line[args.similarity] for line in best])}
    alone = [combined(target, {name: one}, [1.0]) for name, one in chosen.items()]
    if len(alone) == 1:
        return {args.output: alone[0]}
    return {str(Path(args.output) / str(n + 1)): start for n, start in enumerate(alone)}


def _picture(args: argparse.Namespace, library: Mapping[str, PromptArtifact]) -> str:
    """Draws the library, and the target where there is one, in the order of their tree."""
    shown = {**library, **({f"{args.to} (target)": load_artifact(args.to)} if args.to else {})}
    like = SIMILARITIES[args.similarity]
    matrix_QQ = np.array(
        [[like(_rows(a), _rows(b)) for b in shown.values()] for a in shown.values()]
    )
    return write_similarity_plot(
        args.plot, list(shown), matrix_QQ, joints(matrix_QQ), title=f"{args.similarity} cosine"
    )


def _same_place(left: str, right: str) -> bool:
    return Path(left).resolve() == Path(right).resolve()


# ---- recycling -----------------------------------------------------------------------------------


def recycle(
    prompt: PromptArtifact,
    method: str,
    to_backbone: str,
    from_backbone: str = "",
    *,
    seed: int = 0,
    words: int = WORDS,
    skipped: int = SKIPPED,
) -> PromptArtifact:
    """A soft prompt of one backbone as one of another with the same vocabulary.

    Of the backbones only configuration, vocabulary and embedding tables are read.

    Args:
      method: a name of `prompts.recycling.RECYCLERS`.
      from_backbone: empty = the prompt's own.
      seed: of a network's first values and the order of words.
      words, skipped: how many words are learned from, after how many of the most frequent. Words
        are what of the vocabulary is spelled with ASCII letters; the original took English ones
        of a list.
    Raises: UserError for a prompt that is not rows, a backbone that is not the prompt's,
      vocabularies that differ, or one with too few words.
    Source: Lester et al. 2022 (arXiv 2208.05577) and its code.
    """
    if prompt.method["name"] != "soft":
        raise UserError(
            f"prompt {prompt.path} is of method {prompt.method['name']}; only soft prompts, and "
            "those of methods that fold, can be recycled"
        )
    name = from_backbone or prompt.backbone.name
    if not name:
        raise UserError(
            f"prompt {prompt.path} does not say which backbone it is of; name it with "
            "--from-backbone"
        )
    source, target = _backbone(name), _backbone(to_backbone)
    check_backbone(prompt, name, source.identity.fingerprint, source.identity.d_model)
    _check_same_words(source, target)
    ids = word_ids(target.tokenizer)[skipped : skipped + words]
    if not ids:
        raise UserError(
            f"backbone {to_backbone} has no word beyond the first {skipped} to learn from; skip "
            "fewer with --skip-words"
        )
    rows = RECYCLERS[method](_rows(prompt), source.table_VD[ids], target.table_VD[ids], seed)
    return dataclasses.replace(
        prompt,
        backbone=target.identity,
        values={"prompt": rows},
        training={
            "transfer": method,
            "from": prompt.path,
            "from_backbone": dataclasses.asdict(source.identity),
            "words": len(ids),
            "skipped": skipped,
            "seed": seed,
        },
    )


def word_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of all pieces spelled with ASCII letters alone, the mark of a word's start aside."""
    pieces = (tokenizer.piece(token).removeprefix("▁") for token in range(tokenizer.size))
    return [token for token, piece in enumerate(pieces) if piece.isascii() and piece.isalpha()]


@dataclasses.dataclass(frozen=True)
class _Vocabulary:
    """What recycling reads of a backbone."""

    identity: BackboneIdentity
    tokenizer: Tokenizer
    table_VD: np.ndarray


def _backbone(name: str) -> _Vocabulary:
    directory = resolve_backbone(name)
    config = read_config(directory)
    identity = BackboneIdentity(
        name, fingerprint(directory, config), config.d_model, config.vocab_size
    )
    return _Vocabulary(identity, load_tokenizer(directory), read_embedding(directory, config))


def _check_same_words(source: _Vocabulary, target: _Vocabulary) -> None:
    left, right = source.tokenizer, target.tokenizer
    names = f"backbones {source.identity.name} and {target.identity.name} have other vocabularies"
    if left.size != right.size:
        raise UserError(f"{names}, of {left.size} and {right.size} tokens; a prompt is recycled "
                        "through a common one")  # fmt: skip
    for token in range(left.size):
        if left.piece(token) != right.piece(token):
            raise UserError(
                f"{names}: token {token} is {left.piece(token)!r} and {right.piece(token)!r}; a "
                "prompt is recycled through a common one"
            )


def _recycle(args: argparse.Namespace) -> None:
    if not (args.prompt and args.out and args.to_backbone):
        raise UserError("--recycle wants PROMPT, OUT and --to-backbone B, as `jaxprompt transfer "
                        "PROMPT OUT --recycle v2v-lin --to-backbone B`")  # fmt: skip
    prompt = recycle(
        load_artifact(args.prompt), args.recycle, args.to_backbone, args.from_backbone or "",
        seed=args.seed, words=args.words, skipped=args.skip_words,
    )  # fmt: skip
    save_artifact(args.out, prompt)
    told = {
        "output": args.out,
        "method": args.recycle,
        "length": prompt.method["length"],
        "words": prompt.training["words"],
        "from_backbone": prompt.training["from_backbone"]["name"],
        "backbone": prompt.backbone.name,
    }
    if args.json:
        print(json.dumps(told, ensure_ascii=False))
    else:
        print(
            f"{told['output']}: {told['length']} slots of {told['backbone']}, recycled from "
            f"{told['from_backbone']} by {told['method']} over {told['words']:,} words"
        )
