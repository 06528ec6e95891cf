"""Paths of attention: what a row's queries see, and that every path computes the same."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxprompt.planning.flops import equations
from jaxprompt.sharding import make_mesh
from jaxprompt.t5.attention import attend, relative_bias, with_prefix
from jaxprompt.t5.chunks import CHUNK, Chunked
from jaxprompt.t5.config import ATTENTION_PATHS, Compute
from jaxprompt.t5.paths import LONG, PACKED, PATHS, Plain, choose
from jaxprompt.t5.rowwise import Rowwise
from jaxprompt.t5.sight import NOBODY, Sight
from jaxprompt.t5.windows import Windowed
from jaxprompt.typing import Array, UserError

HEADS, KV, BUCKETS, PROMPTS, SLOTS = 2, 4, 8, 3, 2
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2, 2, 0, 0, 0], [1] * 6 + [2] * 5], np.int32)
PROMPT_INDEX = np.array([[2, 0], [1, 2]], np.int32)
SHORT_MASK = np.array([[True, True], [True, False], [True, True]])
ROWS, LENGTH = SEGMENTS.shape


@dataclasses.dataclass(frozen=True)
class Case:
    """One attention of the model."""

    causal: bool = False
    biased: bool = True
    prefix: bool = False
    prefix_mask: bool = False
    before_text: bool = False

    def sight(self) -> Sight:
        segments = jnp.asarray(SEGMENTS)
        sight = Sight(segments, segments, causal=self.causal, max_distance=12)
        if self.prefix:
            mask = jnp.asarray(SHORT_MASK) if self.prefix_mask else None
            sight = sight.behind_prefix(SLOTS, jnp.asarray(PROMPT_INDEX), mask, self.before_text)
        return sight


CASES = {
    "encoder": Case(),
    "decoder": Case(causal=True),
    "cross": Case(biased=False),
    "encoder with prefix": Case(prefix=True),
    "decoder with prefix before the text": Case(causal=True, prefix=True, before_text=True),
    "cross with a bank of unequal prompts": Case(biased=False, prefix=True, prefix_mask=True),
}
ALIKE = {name: case for name, case in CASES.items() if not case.before_text}  # rows' biases
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def arrays() -> dict[str, Array]:
    draw = np.random.default_rng(3)
    own, prefix = (ROWS, LENGTH, HEADS, KV), (PROMPTS, SLOTS, HEADS, KV)
    shapes = dict(
        query=own, key=own, value=own, prefix_key=prefix, prefix_value=prefix,
        table=(HEADS, BUCKETS),
    )  # fmt: skip
    return {
        name: jnp.asarray(draw.normal(size=shape).astype(np.float32))
        for name, shape in shapes.items()
    }


def context(path: Any, case: Case, given: dict[str, Array], **dropout: Any) -> Array:
    key, value = given["key"], given["value"]
    if case.prefix:
        pair = (given["prefix_key"], given["prefix_value"])
        key, value = with_prefix(pair, jnp.asarray(PROMPT_INDEX), key, value)
    prepared = path.prepare(given["table"]) if case.biased else None
    return path(given["query"], key, value, prepared, **dropout)


def context_and_gradient(
    path: Any, case: Case, real: bool = False
) -> tuple[Array, dict[str, Array]]:
    """Of all queries, or of the real ones alone."""
    weights = jnp.asarray(np.random.default_rng(4).normal(size=(ROWS, LENGTH, HEADS, KV)))
    counted = jnp.asarray(SEGMENTS > 0)[..., None, None] if real else jnp.ones((1, 1, 1, 1))
    weights = weights * counted

    def total(given: dict[str, Array]) -> tuple[Array, Array]:
        got = context(path, case, given)
        return jnp.sum(got * weights), got * counted

    gradient, got = jax.jit(jax.grad(total, has_aux=True))(arrays())
    return got, gradient


@functools.cache
def plainly(case: Case, real: bool = False) -> tuple[Array, dict[str, Array]]:
    """What the other paths are compared with."""
    return context_and_gradient(Plain(case.sight()), case, real)


@every_case
@pytest.mark.parametrize("size", [1, 4, 5, 64], ids="chunks of {}".format)
def test_chunks_equal_the_plain_path(case: Case, size: int):
    """Forward, and gradients of inputs, trained prefixes and the bias table; 4 divides no row."""
    got = context_and_gradient(Chunked(case.sight(), size), case)
    want = plainly(case)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)
    moved = {name for name, leaf in want[1].items() if np.abs(leaf).max() > 1e-3}
    still = set() if case.biased else {"table"}
    still |= set() if case.prefix else {"prefix_key", "prefix_value"}
    assert moved == set(arrays()) - still


@every_case
@pytest.mark.parametrize("widths", [(), (1, 2), (2, 3, 5)], ids="{}".format)
@pytest.mark.parametrize("size", [1, 2, 4], ids="chunks of {}".format)
def test_windows_equal_the_plain_path(case: Case, size: int, widths: tuple[int, ...]):
    """At real queries; those of padding stay finite and reach no gradient."""
    got = context_and_gradient(Windowed(case.sight(), size, widths), case, real=True)
    want = plainly(case, real=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


@pytest.mark.parametrize("case", ALIKE.values(), ids=ALIKE)
@pytest.mark.parametrize("mesh", [(1, 1), (2, 2)], ids="data, model {}".format)
def test_rows_one_by_one_equal_the_plain_path(case: Case, mesh: tuple[int, int]):
    """On a mesh each device goes through its own rows and heads."""
    got = context_and_gradient(Rowwise(case.sight(), make_mesh(*mesh)), case)
    want = plainly(case)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), got, want)


def test_rows_one_by_one_refuse_dropout():
    with pytest.raises(UserError, match="rowwise has no dropout"):
        context(
            Rowwise(Case().sight()),
            Case(),
            arrays(),
            dropout_rate=0.1,
            dropout_key=jax.random.key(0),
        )


@given(
    rows=st.sampled_from([1, 4]).flatmap(  # few shapes, so few programs
        lambda count: st.lists(
            st.tuples(st.lists(st.integers(1, 9), max_size=4), st.integers(0, 3)),
            min_size=count,
            max_size=count,
        )
    ),
    size=st.integers(1, 5),
)
def test_a_window_is_the_narrowest_that_holds_its_segments(
    rows: list[tuple[list[int], int]], size: int
):
    """Rows of some segments' lengths, gaps of padding before the last one."""
    segments = np.zeros((len(rows), 12), np.int32)
    for row, (lengths, gap) in enumerate(rows):
        at = 0
        for number, length in enumerate(lengths):
            at += gap if number == len(lengths) - 1 else 0
            segments[row, at : at + length] = number + 1
            at += length
    path = Windowed(Sight(jnp.asarray(segments), jnp.asarray(segments)), size, (1, 2))
    windows = jax.tree.map(np.asarray, path.windows)
    bounds = windows.bounds_L
    assert bounds[0] == 0 and bounds[-1] == len(rows) * path.count
    seen = {}
    for level, width in enumerate(path.widths):
        for number in range(bounds[level], bounds[level + 1]):
            start = int(windows.start_N[number])
            assert 0 <= start <= 12 - width
            seen[int(windows.place_N[number])] = (level, range(start, start + width))
    assert sorted(seen) == list(range(len(rows) * path.count))
    for place, (level, window) in seen.items():
        chunk, row = divmod(place, len(rows))
        queries = segments[row, chunk * path.size : (chunk + 1) * path.size]
        keys = np.flatnonzero(np.isin(segments[row], queries[queries > 0]))
        needed = keys[-1] - keys[0] + 1 if len(keys) else 0
        assert set(keys.tolist()) <= set(window)
        assert level == 0 or needed > path.widths[level - 1]


@every_case
def test_the_plain_path_is_attention_inside_each_segment(case: Case):
    """Against `attend` on each segment by itself, its own prompt before it."""
    given = {name: np.asarray(leaf) for name, leaf in arrays().items()}
    got = np.asarray(context(Plain(case.sight()), case, arrays()))
    for b in range(ROWS):
        for segment in (1, 2):
            own = np.flatnonzero(SEGMENTS[b] == segment)
            prompt = PROMPT_INDEX[b, segment - 1]
            slots = np.arange(SLOTS)[SHORT_MASK[prompt] if case.prefix_mask else slice(None)]
            slots = slots if case.prefix else slots[:0]
            keys, values = (
                np.concatenate([given[f"prefix_{name}"][prompt][slots], given[name][b, own]])
                for name in ("key", "value")
            )
            count = len(own)
            bias = np.zeros((HEADS, count, len(slots) + count), np.float32)
            mask = np.ones((1, count, len(slots) + count), bool)
            if case.causal:
                mask[0, :, len(slots) :] = np.tri(count, dtype=bool)
            if case.biased:
                places = np.concatenate([slots - SLOTS + own[0], own])
                bias[:] = relative_bias(
                    jnp.asarray(given["table"]), jnp.asarray(own), jnp.asarray(places),
                    bidirectional=not case.causal, max_distance=12,
                )  # fmt: skip
                if not case.before_text:
                    bias[:, :, : len(slots)] = 0
            query = given["query"][b, own][None]
            want = attend(query, keys[None], values[None], bias, jnp.asarray(mask))[0]
            np.testing.assert_allclose(got[b, own], want, atol=1e-5)


@given(
    queries=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    keys=st.lists(st.integers(NOBODY, 3), min_size=8, max_size=8),
    causal=st.booleans(),
    first=st.integers(0, 4),
)
def test_the_mask_of_some_queries_is_the_definition(
    queries: list[int], keys: list[int], causal: bool, first: int
):
    """Keys -1 are nobody's, the first two are a prefix, which causal order does not touch."""
    segments = jnp.asarray([queries], jnp.int32)
    sight = Sight(segments, jnp.asarray([keys], jnp.int32), prefix=2, causal=causal)
    got = sight.mask(first, segments[:, first : first + 2])
    want = [
        [q == k and (not causal or j < 2 or j - 2 <= i) for j, k in enumerate(keys)]
        for i, q in enumerate(queries)
    ]
    np.testing.assert_array_equal(got, [want[first : first + 2]])


def test_a_chunk_drops_out_by_its_own_key_and_the_backward_pass_drops_the_same():
    case, given, size, key = Case(), arrays(), 4, jax.random.key(5)
    sight = case.sight()
    path = Chunked(sight, size)
    got = context(path, case, given, dropout_rate=0.4, dropout_key=key)
    whole = Plain(sight)
    for first in range(0, 8, size):
        queries = slice(first, first + size)
        want = attend(
            given["query"][:, queries], given["key"], given["value"],
            whole.prepare(given["table"])[:, queries], whole.mask_BTS[:, queries],
            0.4, jax.random.fold_in(key, first),
        )  # fmt: skip
        np.testing.assert_allclose(got[:, queries], want, atol=1e-5)

    dropped_the_same(Chunked(sight, size))


def test_a_window_drops_out_and_the_backward_pass_drops_the_same():
    path, given = Windowed(Case().sight(), 4, (1, 2)), arrays()
    kept = context(path, Case(), given)
    ones = given | {"value": jnp.ones_like(given["value"])}
    some = context(path, Case(), ones, dropout_rate=0.4, dropout_key=jax.random.key(5))
    assert np.std(np.asarray(some)[SEGMENTS > 0]) > 0.1  # all 1 without dropout
    np.testing.assert_allclose(context(path, Case(), given, dropout_rate=0.4), kept)
    dropped_the_same(path)


def dropped_the_same(path: Any) -> None:
    given, key = arrays(), jax.random.key(5)
    got = context(path, Case(), given, dropout_rate=0.4, dropout_key=key)

    def total(value: Array) -> Array:  # linear in the values: its gradient times them is itself
        return jnp.sum(
            context(path, Case(), given | {"value": value}, dropout_rate=0.4, dropout_key=key) ** 2
        )

    gradient = jax.grad(total)(given["value"])
    np.testing.assert_allclose(jnp.vdot(gradient, given["value"]), 2 * jnp.sum(got**2), rtol=1e-4)


def forward_and_backward(path: type, length: int, table_too: bool = False) -> Any:
    """The traced and jitted gradient of a sum of squares, one row."""
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32)
    array = jax.ShapeDtypeStruct((1, length, HEADS, KV), jnp.float32)
    table = jax.ShapeDtypeStruct((HEADS, BUCKETS), jnp.float32)

    def total(query: Array, key: Array, value: Array, table: Array, segments: Array) -> Array:
        way = path(Sight(segments, segments))
        return jnp.sum(way(query, key, value, way.prepare(table)) ** 2)

    wanted = (0, 1, 2, 3) if table_too else (0, 1, 2)
    return jax.jit(jax.grad(total, wanted)).trace(array, array, array, table, segments)


def largest(traced: Any) -> int:
    """Elements of the largest array that the program makes anywhere."""
    return max(out.aval.size for equation, _ in equations(traced.jaxpr) for out in equation.outvars)


def test_memory_is_linear_in_the_rows_length():
    """Doubling a row doubles its largest array and the compiled program's temporaries."""
    short, long = (forward_and_backward(Chunked, length) for length in (1024, 2048))
    assert 1.9 < largest(long) / largest(short) < 2.2  # the strip is two rows less a chunk
    bytes_short, bytes_long = (
        traced.lower().compile().memory_analysis().temp_size_in_bytes for traced in (short, long)
    )
    assert 1.5 < bytes_long / bytes_short < 2.5
    bytes_short, bytes_long = (
        forward_and_backward(Windowed, length).lower().compile().memory_analysis()
        for length in (1024, 2048)
    )
    assert bytes_long.temp_size_in_bytes < 2.5 * bytes_short.temp_size_in_bytes
    bytes_long = bytes_long.temp_size_in_bytes
    plain = forward_and_backward(Plain, 2048)
    assert largest(plain) >= HEADS * 2048**2
    assert plain.lower().compile().memory_analysis().temp_size_in_bytes > 4 * bytes_long


def test_a_frozen_bias_has_no_gradient_work():
    """Nothing is scattered into the table's shape, except where the table is trained."""

    def scatters(traced: Any) -> int:
        return sum(
            equation.primitive.name == "scatter-add" for equation, _ in equations(traced.jaxpr)
        )

    for path in (Chunked, Windowed):
        assert scatters(forward_and_backward(path, 256)) == 0
        assert scatters(forward_and_backward(path, 256, table_too=True)) == 1


def test_windows_add_up_gradients_of_keys_and_values_and_a_trained_bias():
    """In place, one update each for the loop of every width; none for a frozen bias."""

    def updates(**options: bool) -> int:
        traced = forward_and_backward(Windowed, 512, **options)
        return sum(
            equation.primitive.name == "dynamic_update_slice"
            for equation, _ in equations(traced.jaxpr)
        )

    widths = 3  # 256, 384 and 512 keys
    assert updates() == 2 * widths
    assert updates(table_too=True) == 3 * widths


def test_the_bias_is_looked_up_once_and_not_in_every_chunk():
    lookups = [
        times
        for equation, times in equations(forward_and_backward(Chunked, 512).jaxpr)
        if equation.primitive.name == "gather"
    ]
    assert lookups == [1]


def test_one_place_chooses(monkeypatch: pytest.MonkeyPatch):
    assert set(PATHS) | {"auto"} == set(ATTENTION_PATHS)

    def chosen(attention: str, queries: int, keys: int, segments: int = 1, prefix: int = 0) -> type:
        sight = Sight(jnp.zeros((1, queries), int), jnp.zeros((1, keys), int), prefix)
        return type(choose(Compute(attention=attention), sight, segments))

    for backend, long in LONG.items():
        monkeypatch.setattr(jax, "default_backend", lambda name=backend: name)
        packed = PACKED.get(backend)
        assert chosen("auto", long, long) is Chunked
        assert chosen("auto", long, long - 1) is Plain
        assert chosen("auto", CHUNK, long) is Plain
        assert chosen("auto", long, long, 2) is (Windowed if packed else Chunked)
        assert chosen("auto", long, long, 2, prefix=4) is Chunked
        if packed:
            assert chosen("auto", packed, packed, 2) is Windowed
            assert chosen("auto", packed, packed - 1, 2) is Plain
            assert chosen("auto", CHUNK, packed, 2) is Plain
        assert chosen("plain", long, long) is Plain
        assert chosen("chunked", 2, 2) is Chunked
        assert chosen("windowed", 2, 2) is Windowed
    sight = Sight(jnp.zeros((1, 1024), int), jnp.zeros((1, 1024), int))
    spread = Compute(mesh=make_mesh(2, 1))
    assert type(choose(spread, sight, 4)) is not Windowed


def test_rows_are_taken_one_by_one_where_their_scores_stay_in_fast_memory(
    monkeypatch: pytest.MonkeyPatch,
):
    sight = Sight(jnp.zeros((1, 512), int), jnp.zeros((1, 1024), int))

    def chosen(heads: int, model: int = 1, has_dropout: bool = False) -> type:
        compute = Compute(mesh=make_mesh(1, model))
        return type(choose(compute, sight, 1, heads, has_dropout))

    assert chosen(16) is Plain
    monkeypatch.setattr(Compute, "platform", "tpu")
    assert chosen(16) is Rowwise  # 16 x 512 x 1024 numbers of 4 bytes: 32 MiB
    assert chosen(16, has_dropout=True) is Chunked
    assert chosen(17) is Chunked
    assert chosen(32) is Chunked
    assert chosen(32, model=2) is Rowwise
