"""Reading compiled programs and the roofline, on texts written by hand and against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxprompt.plan import verdict
from jaxprompt.planning.chips import CHIPS, Topology
from jaxprompt.planning.estimate import Estimate, timed
from jaxprompt.planning.flops import matmul_flops
from jaxprompt.planning.program import collectives, compiled_flops
from jaxprompt.planning.shapes import StepShape

EXCHANGES = """\
HloModule jit_step

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %s = f32[] add(%a, %b)
}

%all-reduce-scatter.3 (p: bf16[8,64]) -> bf16[2,64] {
  %p = bf16[8,64]{1,0} parameter(0)
  %whole = bf16[8,64]{1,0} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = bf16[2,64]{1,0} dynamic-slice(%whole, %i), dynamic_slice_sizes={2,64}
}

%gathering (p: bf16[2,64]) -> bf16[8,64] {
  ROOT %g = bf16[8,64]{1,0} all-gather(%p), replica_groups=[2,4]<=[8], dimensions={0}
}

%body.1 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %r = (f32[16]{0:T(128)S(1)}, f32[]{:T(128)}) all-reduce(%x, %y), replica_groups=[2,4]<=[8], \
to_apply=%add
  %scattered = bf16[2,64]{1,0} fusion(%z), kind=kCustom, calls=%all-reduce-scatter.3
}

%cond.1 (t: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] fusion(%i, %n), kind=kLoop, calls=%compare
}

%elsewhere (p: bf16[612,64], t: token[]) -> bf16[612,64] {
  ROOT %r = bf16[612,64]{1,0} all-reduce(%p), replica_groups=mesh['a'=2,'b'=1,'c'=4] {'a','b'}, \
to_apply=%add
}, execution_thread="sparsecore"

%elsewhere.1 (p: bf16[612,64]) -> bf16[612,256] {
  ROOT %g = bf16[612,256]{1,0} all-gather(%p), replica_groups=mesh['a'=2,'b'=4], \
device_ids=([2,4]T(1,0)) {'b':(1)2}, dimensions={1}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8]) -> f32[8] {
  %loop = (s32[], f32[8]{0}) while(%t), condition=%cond.1, body=%body.1, \
backend_config={"known_trip_count":{"n":"24"},"known_init_step":{"init":"0","step":"1"}}
  %start = ((bf16[2,64]{1,0}), bf16[8,64]{1,0}, s32[]) async-start(%a), calls=%gathering
  %done = bf16[8,64]{1,0} async-done(%start), calls=%gathering
  %ag = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%a), replica_groups={{0,1,2,3},{4,5,6,7}}
  %agd = bf16[16]{0} all-gather-done(%ag)
  %many = (f32[2]{0}, f32[3]{0}) all-reduce-start(%a, %b), replica_groups={}, to_apply=%add
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%a), \
source_target_pairs={{0,1},{1,0}}
  %call-start = ((bf16[612,64]{1,0}, token[]), bf16[612,64]{1,0}) call-start(%a, %ready), \
async_execution_thread="sparsecore", to_apply=%elsewhere
  %call-done = bf16[612,64]{1,0} call-done(%call-start)
  %start.1 = ((bf16[612,64]{1,0}), bf16[612,256]{1,0}) call-start(%a), to_apply=%elsewhere.1
  ROOT %a2a = f32[8]{0} all-to-all(%a), replica_groups={{0,1},{2,3}}
}
"""


def test_exchanges_are_found_with_size_group_and_times():
    found = [(one.kind, one.bytes, one.group, one.times) for one in collectives(EXCHANGES, 8)]
    assert found == [
        ("all-reduce", 16 * 4 + 4, 4, 24),
        ("reduce-scatter", 2 * 64 * 2, 4, 24),
        ("all-gather", 8 * 64 * 2, 4, 1),
        ("all-gather", 16 * 2, 4, 1),
        ("all-reduce", 5 * 4, 8, 1),
        ("collective-permute", 5 * 4, 8, 1),
        ("all-reduce", 612 * 64 * 2, 2, 1),
        ("all-gather", 612 * 256 * 2, 2, 1),
        ("all-to-all", 8 * 4, 2, 1),
    ]


def test_rings_send_what_they_have_to():
    """Of N bytes on g devices: twice (g-1)/g, once, the part g-1 times, all of it, half."""
    sent = [one.sent for one in collectives(EXCHANGES, 8)]
    begin = [24 * 68 * 2 * 3 / 4, 24 * 256 * 3, 1024 * 3 / 4, 32 * 3 / 4, 35, 20]
    assert sent == [*begin, 612 * 64 * 2, 612 * 256, 16]


MATMULS = """\
HloModule jit_step

%fused (p: f32[8,612,12,64], q: f32[8,612,12,64]) -> f32[8,12,123,612] {
  %p = bf16[8,123,12,64]{3,1,2,0} parameter(0)
  %q = bf16[8,612,12,64]{3,1,2,0} parameter(1)
  %scores = f32[8,12,123,612]{2,3,1,0:T(8,128)} convolution(%p, %q), \
window={size=8x12 stride=7x11 lhs_dilate=8x12}, dim_labels=0b1f_0o1i->01bf
}

%projecting (x: bf16[8,612,768]) -> bf16[8,612,12,64] {
  %x = bf16[8,612,768]{2,1,0} parameter(0)
  %x4 = bf16[8,612,768,1]{3,1,2,0} bitcast(%x)
  %w = bf16[768,12,64,1]{0,3,1,2} parameter(1)
  ROOT %projected = bf16[8,612,12,64]{1,3,2,0} convolution(%x4, %w), \
window={size=1x12 pad=0_0x11_11 rhs_reversal=0x1}, dim_labels=0bf1_i1o0->0b1f
}

%body (t: (s32[])) -> (s32[]) {
  %f = f32[8,12,123,612]{2,3,1,0} fusion(%a, %b), kind=kOutput, calls=%fused, \
backend_config={"estimated_cycles":"9"}
}

%cond (t: (s32[])) -> pred[] {
  %n = s32[] constant(5)
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[3,7]{1,0} parameter(0)
  %b = f32[7,11]{1,0} parameter(1)
  %loop = (s32[]) while(%t), condition=%cond, body=%body
  %plain = bf16[8,612,2048]{2,1,0} convolution(%l, %r), window={size=1}, dim_labels=0bf_io0->0bf
  %l = bf16[8,612,768]{2,1,0} parameter(2)
  %r = bf16[768,2048,1]{2,1,0} parameter(3)
  ROOT %d = f32[3,11]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""


def test_matmuls_written_as_convolutions_count_their_multiply_adds():
    scores = 8 * 12 * 123 * 612 * 64  # rows, heads, queries, keys, head size
    plain, dot = 8 * 612 * 2048 * 768, 3 * 11 * 7
    assert compiled_flops(MATMULS) == 2 * (5 * scores + plain + dot)


def test_a_padded_window_counts_what_meets_the_kernel():
    """The heads of a projection: 12 outputs, each of them meets one of 12 kernel positions."""
    text = MATMULS.replace("calls=%fused", "calls=%projecting")
    scores, projected = 8 * 12 * 123 * 612 * 64, 8 * 612 * 12 * 64 * 768
    assert compiled_flops(text) - compiled_flops(MATMULS) == 2 * 5 * (projected - scores)


def test_compiled_and_traced_matmuls_agree():
    """Loops, batched and plain matmuls; compiled here."""

    def f(x, ws):
        def layer(x, w):
            return jnp.einsum("bsd,bde->bse", x, w), None

        x, _ = jax.lax.scan(layer, x, ws)
        return x @ x.transpose(0, 2, 1)

    x, ws = jnp.ones((2, 5, 7)), jnp.ones((3, 2, 7, 7))
    traced = jax.jit(f).trace(x, ws)
    text = traced.lower().compile().as_text() or ""
    assert compiled_flops(text) == matmul_flops(traced.jaxpr) == 2 * (3 * 2 * 5 * 49 + 2 * 25 * 7)


FOUND = Estimate(
    topology="v5e:2x4", devices=8, data=2, model=4, shape=StepShape(32, 612, 8, 1, 32),
    weights=5 * 10**9, state=0, activations=3 * 10**9, total=8 * 2**30, capacity=16 * 2**30,
    fits=True, minimum=180e12, flops=197e12, traffic=819e9 / 2, sent={"all-reduce": 75e9},
    cycles=int(3e9),
)  # fmt: skip
TOPOLOGY = Topology("v5e:2x4", CHIPS["v5e"], ())


def test_the_roofline_by_hand():
    """197 TFLOP at 197 TFLOP/s; half a second's traffic; 75 GB over 1 + 2 links of 50 GB/s."""
    found = timed(FOUND, TOPOLOGY)
    assert found.bounds == pytest.approx({"compute": 1.0, "memory": 0.5, "exchanges": 0.5})
    assert found.bound == "compute"
    assert found.seconds == pytest.approx((1.0, 3e9 / 1.5e9 + 75 / 100))
    assert found.examples_per_second == pytest.approx((32 / 2.75, 32.0))
    assert found.share_of_peak == pytest.approx(180 / 197 / 2)  # 3e9 cycles take two seconds
    assert (
        verdict(found) == "fits: 8.00 of 16.00 GiB a chip; bound by compute; 11.6 - 32 examples/s"
    )


def test_without_a_clock_the_bounds_come_one_after_another_twice():
    tpu7x = dataclasses.replace(TOPOLOGY, chip=CHIPS["tpu7x"])
    found = timed(FOUND, tpu7x)
    assert found.seconds == pytest.approx(
        (max(found.bounds.values()), 2 * sum(found.bounds.values()))
    )


def test_cycles_below_the_roofline_do_not_beat_it():
    found = timed(dataclasses.replace(FOUND, cycles=1000, sent={}), TOPOLOGY)
    assert found.seconds == (1.0, 1.0)


def test_verdicts():
    over = dataclasses.replace(FOUND, fits=False, total=21.5 * 2**30)
    assert verdict(over).startswith("does not fit: needs 21.50 of 16.00 GiB a chip; --search")
    here = dataclasses.replace(FOUND, capacity=None)
    assert verdict(here).startswith("fits: 8.00 GiB a device; speed is predicted for v3, v4")
