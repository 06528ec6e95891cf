"""Attention of packed rows that looks at no more keys than a chunk's segments have.

`Windowed` is one of the paths that `t5.paths.choose` picks from.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxprompt.t5.attention import attend
from jaxprompt.t5.chunks import CHUNK, Chunked
from jaxprompt.t5.layers import fold_key
from jaxprompt.t5.sight import Sight
from jaxprompt.typing import Array

WIDTHS = (2, 3, 5)  # of windows narrower than a row, in chunks


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
    """One chunk of one row each, N = chunks * rows of them, ordered by width.

    Attributes:
      place_N: which of the chunks of `Chunked._split` it is, chunk by chunk, row by row.
      start_N: its first key.
      bounds_L: where the windows of each width begin, and N.
    """

    place_N: Array
    start_N: Array
    bounds_L: Array


class Windowed(Chunked):
    """Some queries of one row at a time, and a window of keys that holds their segments.

    Segments stand one after another, so what a chunk's queries may see is one range of keys. How
    long it is, only the batch knows: the narrowest of a few widths that holds it is taken, the
    whole row if need be, by one loop for each width. Gradients of keys and values are added up in
    place, which differentiating a loop over slices would not do. Queries of padding, whose results
    reach no segment, see what there is. With trained prefixes this is `Chunked`.
    """

    def __init__(self, sight: Sight, size: int = CHUNK, widths: Sequence[int] = WIDTHS):
        super().__init__(sight, size)
        keys = sight.key_segments_BS.shape[1]
        narrow = {width * self.size for width in widths}
        self.widths = [*sorted(width for width in narrow if width < keys), keys]
        if not sight.prefix:
            self.segments_NT = self._chunks(sight.query_segments_BT)
            self.windows = self._windows(sight)

    def __call__(
        self,
        query_BTHK: Array,
        key_BSHK: Array,
        value_BSHK: Array,
        prepared: tuple[Array, Array | None] | None,
        dropout_rate: float = 0.0,
        dropout_key: Array | None = None,
    ) -> Array:
        """As `Path`; a chunk draws its dropout from the key folded with its place."""
        if self.sight.prefix:
            return super().__call__(
                query_BTHK, key_BSHK, value_BSHK, prepared, dropout_rate, dropout_key
            )
        rows, queries = query_BTHK.shape[:2]
        seed = (
            jax.random.key_data(dropout_key) if dropout_rate and dropout_key is not None else None
        )
        given = (self.windows, self.segments_NT, self.sight.key_segments_BS, seed)
        context_NTHK = self._attention(dropout_rate)(
            self._chunks(query_BTHK), key_BSHK, value_BSHK, prepared and prepared[0], given
        )
        context_CBTHK = context_NTHK.reshape(self.count, rows, *context_NTHK.shape[1:])
        context_BTHK = jnp.moveaxis(context_CBTHK, 0, 1).reshape(
            rows, self.count * self.size, *context_NTHK.shape[2:]
        )
        return context_BTHK[:, :queries]

    def _chunks(self, x_BT: Array) -> Array:
        """[B, T, ...] -> [N, size, ...]."""
        chunks_CBT = self._split(x_BT)
        return chunks_CBT.reshape(-1, *chunks_CBT.shape[2:])

    def _windows(self, sight: Sight) -> Windows:
        rows, keys = sight.key_segments_BS.shape
        segments_CBT = self.segments_NT.reshape(self.count, rows, self.size)
        seen_CBTS = segments_CBT[..., None] == sight.key_segments_BS[None, :, None]
        seen_NS = jnp.any(seen_CBTS & (segments_CBT > 0)[..., None], axis=2).reshape(-1, keys)
        first_N = jnp.argmax(seen_NS, axis=1)
        end_N = jnp.where(jnp.any(seen_NS, axis=1), keys - jnp.argmax(seen_NS[:, ::-1], axis=1), 0)
        widths_L = jnp.array(self.widths)
        level_N = jnp.searchsorted(widths_L, end_N - first_N)
        place_N = jnp.argsort(level_N)
        return Windows(
            place_N=place_N,
            start_N=jnp.minimum(first_N, keys - widths_L[level_N])[place_N],
            bounds_L=jnp.searchsorted(level_N[place_N], jnp.arange(len(self.widths) + 1)),
        )

    def _attention(self, rate: float) -> Callable[..., Array]:
        """The attention of chunks and what its backward pass does; arrays are all arguments."""

        def forward(
            query_NTHK: Array, key: Array, value: Array, strip: Array | None, given: tuple
        ) -> Array:
            def one(width: int, number: Array, context_NTHK: Array) -> Array:
                place, look, attention = self._one(width, number, given, rate)
                context = attention(query_NTHK[place], *look(key, value, strip))
                return context_NTHK.at[place].set(context)

            return self._loops(one, given[0], jnp.zeros_like(query_NTHK, value.dtype))

        def backward(residuals: tuple, gradient_NTHK: Array | SymbolicZero) -> tuple:
            query_NTHK, key, value, strip, given, bias_trained = residuals
            if isinstance(gradient_NTHK, SymbolicZero):
                gradient_NTHK = jnp.zeros_like(query_NTHK, value.dtype)

            def one(width: int, number: Array, sums: tuple) -> tuple:
                queries, *wholes = sums
                place, look, attention = self._one(width, number, given, rate)
                seen, add = look(key, value, strip), look.add
                _, pull = jax.vjp(attention, query_NTHK[place], *seen)
                query, *parts = pull(gradient_NTHK[place])
                return queries.at[place].set(query), *add(wholes, parts)

            trained = strip if bias_trained is not None else None
            zeros = jax.tree.map(jnp.zeros_like, (query_NTHK, key, value, trained))
            return *self._loops(one, given[0], zeros), None

        def keep(*arguments: Any) -> tuple[Array, tuple]:
            values = jax.tree.map(lambda argument: argument.value, arguments, is_leaf=_is_primal)
            bias = arguments[3]
            bias_trained = () if bias is not None and bias.perturbed else None
            return forward(*values), (*values, bias_trained)

        attention = jax.custom_vjp(forward)
        attention.defvjp(keep, backward, symbolic_zeros=True)
        return attention

    def _loops(self, one: Callable, windows: Windows, carried: Any) -> Any:
        """Runs one(width, number, carried) for the windows of each width."""
        for level, width in enumerate(self.widths):
            carried = jax.lax.fori_loop(
                windows.bounds_L[level],
                windows.bounds_L[level + 1],
                lambda number, carried, width=width: one(width, number, carried),
                carried,
            )
        return carried

    def _one(self, width: int, number: Array, given: tuple, rate: float) -> tuple:
        """A window's place, its `_Look`, and the attention of its queries over what it sees."""
        windows, segments_NT, key_segments_BS, seed = given
        place, start = windows.place_N[number], windows.start_N[number]
        row = place % key_segments_BS.shape[0]
        first = place // key_segments_BS.shape[0] * self.size
        look = _Look(row, start, self._shift - first + start, width)
        segments_BS = jax.lax.dynamic_slice(key_segments_BS, (row, start), (1, width))
        sight = dataclasses.replace(self.sight, key_segments_BS=segments_BS)
        mask_BTS = sight.mask(first - start, segments_NT[place][None])
        key = None
        if seed is not None:
            keys = jax.random.wrap_key_data(seed)
            key = jax.random.fold_in(keys[row], first) if keys.ndim else fold_key(keys, place)

        def attention(
            query_THK: Array, key_BSHK: Array, value_BSHK: Array, bias_HTS: Array | None
        ) -> Array:
            return attend(query_THK[None], key_BSHK, value_BSHK, bias_HTS, mask_BTS, rate, key)[0]

        return place, look, attention


@dataclasses.dataclass(frozen=True)
class _Look:
    """Slices keys, values and the bias's strip for one window, and adds gradients there."""

    row: Array
    start: Array
    distance: Array
    width: int

    def __call__(self, key: Array, value: Array, strip: Array | None) -> tuple:
        return tuple(
            None if whole is None else jax.lax.dynamic_slice(whole, at, size)
            for whole, at, size in self._places(key, value, strip)
        )

    def add(self, wholes: Sequence, parts: Sequence) -> tuple:
        return tuple(
            None
            if whole is None
            else jax.lax.dynamic_update_slice(
                whole, jax.lax.dynamic_slice(whole, at, size) + part, at
            )
            for (whole, at, size), part in zip(self._places(*wholes), parts, strict=True)
        )

    def _places(self, key: Array, value: Array, strip: Array | None) -> list[tuple]:
        own, (heads, kv) = (self.row, self.start, 0, 0), key.shape[2:]
        size = (1, self.width, heads, kv)
        strip_size = None if strip is None else (heads, strip.shape[1], self.width)
        return [
            (key, own, size),
            (value, own, size),
            (strip, (0, 0, self.distance), strip_size),
        ]


def _is_primal(x: Any) -> bool:
    return hasattr(x, "perturbed")
