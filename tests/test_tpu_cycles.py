"""The reader of the TPU compiler's estimates, on a small program written by hand."""

import pytest
import tiny

from benchmarks.tpu_cycles import batch_of, kind_table, layouts
from jaxprompt.planning.program import Op, by_kind, dearest, ops, total_cycles

HLO = """\
HloModule jit_step, is_scheduled=true

%fused.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %inside = f32[8]{0} exponential(%p), backend_config={"estimated_cycles":"999"}
}

%inner_cond.2 (t: (s32[], f32[8])) -> pred[] {
  %three = s32[]{:T(128)} constant(3)
  %t = (s32[]{:T(128)}, f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%t), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %three), direction=LT
}

%inner_body.2 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %f = f32[8]{0} fusion(%x), calls=%fused.1, metadata={op_name="jit(step)/scores"}, \
backend_config={"window_config":{"estimated_cycles":"100"}}
}

%cond.1 (t: (s32[], f32[8])) -> pred[] {
  %one = s32[] constant(1)
  %twelve = s32[]{:T(128)} constant(12)
  ROOT %lt = pred[]{:T(512)} compare(%i, %twelve), direction=LT
}

%body.1 (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %g = f32[8]{0} fusion(%x), calls=%fused.1, metadata={op_name="jit(step)/mlp"}, \
backend_config={"window_config":{"estimated_cycles":"7"}}
  %w = (s32[], f32[8]{0}) while(%t), condition=%inner_cond.2, body=%inner_body.2, metadata={}
  %b = f32[8]{0} custom-call(), custom_call_target="AllocateBuffer"
  %k = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call", \
metadata={op_name="jit(step)/kernel"}
}

%unused (t: f32[8]) -> f32[8] {
  %never = f32[8]{0} fusion(%x), calls=%fused.1, backend_config={"estimated_cycles":"5000"}
}

%elsewhere (p: f32[8]) -> f32[8] {
  ROOT %copied = f32[8]{0} copy(%p), backend_config={"estimated_cycles":"9223372036854775807"}
}, execution_thread="sparsecore"

ENTRY %main (a: f32[8]) -> f32[8] {
  %start = ((f32[8]{0}), f32[8]{0}, s32[]) call-start(%a), to_apply=%elsewhere
  %loop = (s32[], f32[8]{0}) while(%t), condition=%cond.1, body=%body.1, metadata={}
  %last = f32[8]{0} fusion(%x), calls=%fused.1, metadata={op_name="jit(step)/mlp"}, \
backend_config={"window_config":{"estimated_cycles":"11"}}
  ROOT %bare.3 = f32[8]{0} fusion(%x), calls=%fused.1, backend_config={"estimated_cycles":"2"}
}
"""


def test_bodies_count_as_often_as_their_loop_runs():
    found = ops(HLO)
    assert total_cycles(found) == 12 * (7 + 3 * 100) + 11 + 2
    assert dearest(found, 3) == [("jit(step)/scores", 3600), ("jit(step)/mlp", 95), ("bare.3", 2)]


def test_a_steps_cycles_are_sorted_by_kind_and_pass():
    """Names as JAX writes them; a loop inside a recomputed layer is recomputed."""
    forward, backward = "jit(step)/jvp()/while/body/", "jit(step)/transpose(jvp())/while/body/"
    names = [
        forward + "closed_call/bthk,bshk->bhts/dot_general",
        backward + "checkpoint/rematted_computation/while/body/bthk,bshk->bhts/dot_general",
        backward + "checkpoint/bthk,bshk->bhts/dot_general",
        backward + "jit(dynamic_index_in_dim)/squeeze",
        forward + "dot_general",
        "jit(step)/jvp(...d,dv->...v)/dot_general",
        "jit(step)/transpose(jvp(...d,dv->...v))/dot_general",
        "jit(step)/sub",
    ]
    found = [Op(name, 10**6 * (i + 1), 2, True) for i, name in enumerate(names)]
    assert by_kind(found) == {
        ("logits", "forward"): 12e6, ("logits", "backward"): 14e6,
        ("rest", ""): 16e6,
        ("scores", "forward"): 2e6, ("scores", "recomputed"): 4e6, ("scores", "backward"): 6e6,
        ("mlp", "forward"): 10e6,
        ("slices of stacked arrays", "backward"): 8e6,
    }  # fmt: skip
    lines = kind_table(found).splitlines()
    assert [cell.strip() for cell in lines[4].split("|")[1:-1]] == [
        "scores", "2.0", "4.0", "6.0", "0.0", "12.0", "17 %",
    ]  # fmt: skip


def test_loops_that_count_without_sign_are_read():
    """Those that overlap a matmul with an exchange."""
    unsigned = HLO.replace("%twelve = s32[]", "%twelve = u32[]")
    assert unsigned != HLO and total_cycles(ops(unsigned)) == total_cycles(ops(HLO))


def test_kernels_are_named_though_nothing_is_estimated():
    calls = [op for op in ops(HLO) if op.kernel]
    assert [(op.name, op.cycles, op.times, op.estimated) for op in calls] == [
        ("jit(step)/kernel", 0, 12, False)
    ]


def test_what_cannot_be_read_is_an_error():
    with pytest.raises(ValueError, match="ENTRY"):
        ops("HloModule nothing\n")
    with pytest.raises(ValueError, match=r"cond\.1"):
        ops(HLO.replace("constant(12)", "parameter(0)").replace("compare(%i, %twelve)", "and()"))


def test_packed_rows_hold_the_same_examples():
    padded, packed = layouts(examples=8, real=256, padded=612, row=1024, targets=8)
    assert (padded.rows, padded.encoder, padded.targets) == (8, 612, 8)
    assert (packed.rows, packed.encoder, packed.targets) == (2, 1024, 32)
    batch = batch_of(tiny.CONFIG, packed, slots=100)
    assert batch.encoder_ids_BS.shape == (2, 1024) and batch.targets_BT.shape == (2, 32)
    assert batch.prompt_index_BG.shape == batch.example_index_BG.shape == (2, 4)
    with pytest.raises(ValueError, match="rows of 4"):
        layouts(examples=6, real=256, padded=612, row=1024, targets=8)
