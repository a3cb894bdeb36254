"""The lines are shortened from what XLA wrote for TPU v5e (libtpu 0.0.42) and for a CPU."""

import pytest

from sd_jax.training.collectives import sent_bytes

AXES = {"slice": 1, "data": 4, "fsdp": 4, "tensor": 1}
HEAD = "HloModule jit_step, num_partitions=16\n\n"


def _program(*lines):
    return HEAD + "ENTRY %main.1_spmd (param: f32[8]) -> f32[8] {\n" + "".join(f"  {line}\n" for line in lines) + "}\n"


# Devices 0-3 are one row of fsdp; 0, 4, 8, 12 one column of data
OVER_FSDP = "replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}"
OVER_DATA = "replica_groups=[4,4]<=[4,4]T(1,0)"
NAMED_DATA = "replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=4], device_ids=([4,4]T(1,0)) {'axis_2'}"
NAMED_BOTH = "replica_groups=mesh['axis_0'=4,'axis_1'=4] {'axis_0','axis_1'}"


@pytest.mark.parametrize(
    ("line", "kind", "sent"),
    [
        (f"%a = f32[1024]{{0:T(8,128)}} all-reduce(%x), channel_id=1, {OVER_FSDP}", "all-reduce", 2 * 4096 * 3 / 4),
        (f"%a = bf16[1024]{{0}} all-gather(%x), {OVER_DATA}, dimensions={{0}}", "all-gather", 2048 * 3 / 4),
        (f"%a = f32[256]{{0}} reduce-scatter(%x), {OVER_FSDP}", "reduce-scatter", 4096 * 3 / 4),
        (f"%a = (s8[64]{{0}}, s8[64]{{0}}) all-to-all(%x, %y), {NAMED_DATA}", "all-to-all", 128 * 3 / 4),
        (f"%a = f32[] all-reduce(%x), {NAMED_BOTH}, to_apply=%add", "all-reduce", 2 * 4 * 15 / 16),
        (
            "%p = (f32[48]{0}, f32[48]{0}, u32[]{:S(2)}) collective-permute-start(%x), source_target_pairs={{0,1}}",
            "collective-permute",
            192,
        ),
        (f"%g = (f32[256]{{0}}, f32[1024]{{0}}) all-gather-start(%x), {OVER_FSDP}", "all-gather", 4096 * 3 / 4),
        ("%d = f32[1024]{0} all-gather-done(%g)", None, 0),
        ("%f = f32[1024]{0} fusion(%all-reduce.3), kind=kLoop", None, 0),
    ],
)
def test_bytes_of_one_operation(line, kind, sent):
    assert sent_bytes(_program(line), AXES) == ({} if kind is None else {kind: sent})


def test_larger_mesh_changes_what_goes_over_its_axis_alone():
    program = _program(
        f"%a = f32[1024]{{0}} all-reduce(%x), {NAMED_DATA}", f"%b = f32[1024]{{0}} all-gather(%a), {OVER_FSDP}"
    )
    assert sent_bytes(program, AXES, {"data": 4}) == {
        "all-reduce": 2 * 4096 * 15 / 16,  # of groups of 4, now 16
        "all-gather": 4096 * 3 / 4,
    }


def test_group_of_all_devices_grows_with_every_axis():
    program = _program("%a = f32[1024]{0} all-reduce(%x), replica_groups={}, to_apply=%add")
    assert sent_bytes(program, AXES, {"data": 4}) == {"all-reduce": 2 * 4096 * 63 / 64}


LOOP = """%body.1 (p: (s32[], f32[1024])) -> (s32[], f32[1024]) {
  %a = f32[1024]{0} all-reduce(%x), replica_groups={{0,1,2,3}}, to_apply=%add
}

%condition.1 (p: (s32[], f32[1024])) -> pred[] {
  %constant.7 = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %constant.7), direction=LT
}

"""
RUN = "%w = (s32[], f32[1024]) while(%t), condition=%condition.1, body=%body.1"


@pytest.mark.parametrize(
    ("told", "times"), [("", 5), (', backend_config={"known_trip_count":{"n":"3"}}', 3)], ids=["compared", "told"]
)
def test_loop_counts_as_often_as_it_runs(told, times):
    program = _program(RUN + told).replace(HEAD, HEAD + LOOP)
    assert sent_bytes(program, AXES) == {"all-reduce": times * 2 * 4096 * 3 / 4}


def test_fusion_that_keeps_its_part_of_a_sum_is_a_reduce_scatter():
    fused = """%all-reduce-scatter.1.clone (input.4: f32[1024]) -> f32[256] {
  %all-reduce.9 = f32[1024]{0} all-reduce(%pad.4), replica_groups={{0,1,2,3}}, to_apply=%add.clone
}

"""
    program = _program("%f = f32[256]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1.clone")
    assert sent_bytes(program.replace(HEAD, HEAD + fused), AXES) == {"reduce-scatter": 4096 * 3 / 4}
