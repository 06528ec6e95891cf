"""A training step over the parts of a batch, compiled once for each of their shapes."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxprompt.data.side_by_side import Part
from jaxprompt.hosts import from_first
from jaxprompt.steps import Optimizers, TrainState, gradients, train_step, update
from jaxprompt.typing import Array, ArrayTree, UserError

_GIB = 2**30


class CompiledStep:
    """(state, frozen, parts) -> (state, metrics): what `steps.train_step` does, state donated.

    The kind of a part is its `StepOptions`. One part is one program; gradients of several are
    added up, then the optimizers move.
    """

    def __init__(self, graphdef: Any, optimizers: Optimizers):
        self._count = len(optimizers)
        self._whole = jax.jit(
            functools.partial(train_step, graphdef, optimizers), static_argnums=0, donate_argnums=1
        )
        self._gradients = jax.jit(functools.partial(gradients, graphdef), static_argnums=0)
        self._update = jax.jit(functools.partial(update, optimizers), donate_argnums=0)
        self._add = jax.jit(functools.partial(jax.tree.map, jax.numpy.add), donate_argnums=0)
        self._programs: dict[Any, Callable[..., Any]] = {}

    def __call__(
        self, state: TrainState, frozen: ArrayTree, parts: Sequence[Part]
    ) -> tuple[TrainState, dict[str, Array]]:
        """One step; raises UserError if the prompts do not fit into memory together."""
        if len(parts) == 1:
            return self._run(self._whole, parts[0], state, frozen)
        total = None
        for part in parts:
            own = self._run(self._gradients, part, state, frozen)
            total = own if total is None else self._add(total, own)
        assert total is not None, "a step without a batch"
        return self._update(state, *total)

    def traced(self, kind: Any, state: Any, frozen: Any, batch: Any) -> jax.stages.Traced:
        """The program of a step of one part, of arrays or of their shapes: what `plan` compiles."""
        return self._whole.trace(kind, state, frozen, batch)

    def _run(self, program: Any, part: Part, state: TrainState, frozen: ArrayTree) -> Any:
        batch = part.batch
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(batch))
        key = (program is self._whole, part.kind, shapes)
        if key not in self._programs:
            try:
                options = compiler_options(_device(batch))
                lowered = program.lower(part.kind, state, frozen, batch)
                compiled = lowered.compile(compiler_options=options)
            except jax.errors.JaxRuntimeError as error:
                if self._count > 1 and "RESOURCE_EXHAUSTED" in str(error):
                    raise _too_many(self._count, self._count // 2, "more memory") from error
                raise
            if self._count > 1:
                _check_fits(compiled, self._count)
            # jax 0.10 refuses 4-bit arguments of what was compiled ahead; its jit takes them
            ahead = not any(str(leaf.dtype) == "int4" for leaf in jax.tree.leaves(frozen))
            self._programs[key] = compiled if ahead else functools.partial(program, part.kind)
        return self._programs[key](state, frozen, batch)


def compiler_options(device: Any) -> dict[str, str | bool]:
    """What the compiler for a device is told beside its defaults.

    Large tiles of matmuls want more of a chip's fast memory than the 16 MiB that a fusion gets by
    default; v5e and v6e have 128.
    """
    large = device.platform == "tpu" and device.device_kind in ("TPU v5 lite", "TPU v6 lite")
    return {"xla_tpu_scoped_vmem_limit_kib": str(32 * 1024)} if large else {}


def room_for_activations() -> int | None:
    """Whole GiB free on an accelerator, the same for all processes; None on CPU."""
    if jax.default_backend() == "cpu":
        return None
    free, _ = from_first(lambda: (free_bytes(), []))
    return None if free is None else free // _GIB * _GIB


def free_bytes() -> int | None:
    """Memory of the first device that nothing holds yet; None if it cannot be told."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    if jax.default_backend() == "cpu":
        try:
            with open("/proc/meminfo", encoding="ascii") as lines:
                sizes = dict(line.split(":") for line in lines)
            return int(sizes["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError, ValueError):
            return None
    return None


def _device(batch: ArrayTree) -> Any:
    """One of those that hold a batch."""
    return next(iter(jax.tree.leaves(batch)[0].sharding.device_set))


def _check_fits(compiled: Any, count: int) -> None:
    """Raises: UserError that says how many prompts would fit, if these do not."""
    told, free = compiled.memory_analysis(), free_bytes()
    if told is None or free is None:
        return
    needed = told.temp_size_in_bytes + told.output_size_in_bytes - told.alias_size_in_bytes
    if needed > free:
        what = f"{needed / _GIB:.1f} GiB, {free / _GIB:.1f} GiB are free"
        raise _too_many(count, int(count * free / needed), what)


def _too_many(count: int, fitting: int, needed: str) -> UserError:
    fits = f"about {fitting} would fit" if fitting else "not even one would fit"
    return UserError(
        f"training {count} prompts at once takes {needed}: {fits}; set train.at_once="
        f"{max(fitting, 1)}, a smaller data.batch_size or backbone.remat=full"
    )
