"""Looks for the settings under which a training step fits a topology and takes least time."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxprompt.config import RunConfig
from jaxprompt.planning.abstract import weights_on_a_device
from jaxprompt.planning.apart import CompilerFailed, estimate_apart
from jaxprompt.planning.chips import Topology
from jaxprompt.planning.estimate import Estimate
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.backbones import planned_config
from jaxprompt.t5.config import REMAT_POLICIES
from jaxprompt.typing import UserError

Settings = dict[str, Any]
_ROOM = 1.1  # activations shrink a little less than the rows that are computed together


@dataclasses.dataclass(frozen=True)
class Tried:
    """Settings, config keys with dots, and what the step needs under them."""

    settings: Settings
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search found.

    Attributes:
      ranking: best first; those that do not fit come last.
      skipped: settings that were not compiled, and why.
      stopped: by Ctrl-C, before all was tried.
    """

    ranking: Sequence[Tried]
    skipped: Sequence[tuple[Settings, str]]
    stopped: bool = False


def _mesh_models(topology: Topology) -> list[int]:
    count = len(topology.devices)
    return [size for size in range(1, count + 1) if count % size == 0]


# What is tried without being asked, by config key. `mesh.data` takes the devices that `mesh.model`
# leaves; `train.accumulate` grows until a step fits; keys that wait have their first value, and
# their others are tried on the best: a compilation takes minutes, and what a layer keeps matters
# less than the mesh where "auto" has kept what fits.
DIMENSIONS: dict[str, Callable[[Topology], Sequence[Any]]] = {
    "mesh.model": _mesh_models,
    "mesh.weights_over_data": lambda topology: (False, True),
    "backbone.remat": lambda topology: ("auto", *REMAT_POLICIES),
    "train.accumulate": lambda topology: (1, 2, 4, 8, 16, 32),
    "backbone.scan_unroll": lambda topology: (0, 2),
    "mesh.rows_over_model": lambda topology: (topology.chip is not None, topology.chip is None),
}
_GROWS = "train.accumulate"
_WAIT = ("backbone.remat", "backbone.scan_unroll", "mesh.rows_over_model")
_SMALLER: Settings = {"backbone.quantize": "int8"}  # changes results: tried where nothing else fits


def search(
    config_with: Callable[[Settings], RunConfig],
    topology: Topology,
    *,
    prompts: int = 1,
    limit: int,
    asked: Mapping[str, Sequence[Any]],
    say: Callable[[str], None],
) -> Found:
    """Compiles the promising settings: all meshes, cheapest exchanges first, the rest on the best.

    Weights that fill a chip by themselves are not compiled. Microbatches get smaller only where a
    step does not fit, and then at once by as much as it lacks. Where nothing fits, all is tried
    again with int8 weights. Of "auto" the policy that it came to is told. Ctrl-C ends a search, not
    what it has found.

    Args:
      config_with: the run's config under some settings.
      prompts: trained at once, all with that config.
      limit: compilations at most.
      asked: other values of `DIMENSIONS`, or of other config keys, which are tried as well.
      say: takes a line on each compilation.
    """
    values = {key: tuple(choices(topology)) for key, choices in DIMENSIONS.items()}
    values |= {key: tuple(own) for key, own in asked.items()}
    tried: list[Tried] = []
    skipped: list[tuple[Settings, str]] = []
    compilations = 0

    def compiled(settings: Settings) -> Estimate | None:
        nonlocal compilations
        if compilations >= limit:
            skipped.append((settings, f"after {limit} compilations"))
            return None
        found, line = None, "the compiler failed"
        try:
            found = estimate_apart(config_with(settings), topology, prompts)
        except UserError as error:
            skipped.append((settings, str(error)))
            if not isinstance(error, CompilerFailed):  # nothing was compiled
                return None
        else:
            settings = {**settings, "backbone.remat": found.remat}
            tried.append(Tried(settings, found))
            line = _line(found)
        compilations += 1
        say(f"{compilations}: {' '.join(overrides(settings))}: {line}")
        return found

    def try_all() -> None:
        for smaller in ({}, _SMALLER):
            for settings in _product(values):
                settings = {**settings, **smaller}
                reason = _hopeless(config_with, topology, settings)
                if reason:
                    skipped.append((settings, reason))
                    continue
                _shrink_until_it_fits(compiled, settings, values[_GROWS])
            if any(one.estimate.fits for one in tried) or _SMALLER.keys() & values.keys():
                break
        for key in _WAIT:
            best = _ranked(tried)[:1]
            for value in values[key]:
                settings = _on(best, key, value)
                if settings and key == "backbone.remat":  # it keeps less, or more
                    _shrink_until_it_fits(compiled, settings, values[_GROWS])
                elif settings:
                    compiled(settings)

    stopped = False
    try:
        try_all()
    except KeyboardInterrupt:
        stopped = True
    return Found(_ranked(tried), skipped, stopped)


def overrides(settings: Mapping[str, Any]) -> list[str]:
    """As one would type them."""
    return [
        f"{key}={str(value).lower() if isinstance(value, bool) else value}"
        for key, value in settings.items()
    ]


def _product(values: Mapping[str, Sequence[Any]]) -> Iterator[Settings]:
    """All settings but those of keys that wait, the mesh changing fastest, few exchanges first."""
    keys = [key for key in values if key not in (_GROWS, *_WAIT)]
    outer = [key for key in keys if not key.startswith("mesh.")]
    inner = [key for key in keys if key.startswith("mesh.")]
    for chosen in itertools.product(*(values[key] for key in [*outer, *inner])):
        settings = dict(zip([*outer, *inner], chosen, strict=True))
        settings = {key: settings[key] for key in keys}
        yield {"mesh.data": -1, **settings, **{key: values[key][0] for key in _WAIT}}


def _hopeless(
    config_with: Callable[[Settings], RunConfig], topology: Topology, settings: Settings
) -> str:
    """Why these settings need no compilation; empty if they do."""
    try:
        own = config_with(settings)
        mesh = make_mesh(own.mesh.data, own.mesh.model, topology.devices)
        t5 = planned_config(own.backbone.name, own.backbone.revision)
        weights = weights_on_a_device(own, t5, mesh)
    except UserError as error:
        return str(error)
    if own.mesh.weights_over_data and mesh.shape["data"] == 1:
        return "nothing to divide weights over"
    if topology.chip is not None and weights > topology.chip.memory:
        return f"weights alone take {weights / 2**30:.1f} GiB"
    return ""


def _on(best: Sequence[Tried], key: str, value: Any) -> Settings:
    """The best settings with another value; empty where that is no other program."""
    if not best or not best[0].estimate.fits or value in (best[0].settings[key], "auto"):
        return {}
    if key == "mesh.rows_over_model" and best[0].estimate.model == 1:
        return {}
    return {**best[0].settings, key: value}


def _shrink_until_it_fits(
    compiled: Callable[[Settings], Estimate | None], settings: Settings, parts: Sequence[int]
) -> None:
    smallest = 0
    for count in sorted(map(int, parts)):
        if count < smallest:
            continue
        found = compiled({**settings, _GROWS: count})
        if found is None or found.fits or found.capacity is None:
            return
        room = found.capacity - found.weights - found.state
        if room <= 0 or not found.activations > 0:
            return
        smallest = max(count + 1, math.ceil(count * _ROOM * found.activations / room))


def _ranked(tried: Sequence[Tried]) -> list[Tried]:
    """By the compiler's seconds; without them by FLOPs, then memory."""

    def key(one: Tried) -> tuple[Any, ...]:
        found = one.estimate
        seconds = found.seconds[1] if found.seconds else 0.0
        return not found.fits, seconds, found.flops, found.total

    return sorted(tried, key=key)


def _line(found: Estimate) -> str:
    fits = "fits" if found.fits else "does not fit"
    rate = found.examples_per_second
    speed = f", {rate[0]:.1f} - {rate[1]:.1f} examples/s" if rate else ""
    return f"{fits}, {found.total / 2**30:.2f} GiB{speed}"
