"""A program's text, written by hand so that its traffic can be."""

from nla_jax.planning.hlo import read_traffic

PROGRAM = """HloModule jit_f, is_scheduled=true

%sliced (p0: bf16[8,1024], p1: s32[]) -> bf16[1,1024] {
  %p0 = bf16[8,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  ROOT %slice.1 = bf16[1,1024]{1,0} dynamic-slice(%p0, %p1, %p1), dynamic_slice_sizes={1,1024}
}

%updated (q0: f32[16,256], q1: f32[1,256], q2: s32[]) -> f32[16,256] {
  %q0 = f32[16,256]{1,0} parameter(0)
  %q1 = f32[1,256]{1,0} parameter(1)
  %q2 = s32[] parameter(2)
  ROOT %dus = f32[16,256]{1,0} dynamic-update-slice(%q0, %q1, %q2, %q2)
}

%condition (c: (s32[], bf16[128,64])) -> pred[] {
  %c = (s32[], bf16[128,64]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(5)
  %i = s32[] get-tuple-element(%c), index=0
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], bf16[128,64])) -> (s32[], bf16[128,64]) {
  %b = (s32[], bf16[128,64]{1,0}) parameter(0)
  %w = bf16[128,64]{1,0:T(8,128)(2,1)} get-tuple-element(%b), index=1
  %gather = bf16[1024,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%w), channel_id=1, replica_groups=mesh['x'=8] {'x'}
  ROOT %t = (s32[], bf16[128,64]{1,0}) tuple(%b, %w)
}

%beside (r0: bf16[128,64], r1: bf16[1024,64], r2: f32[1,256]) -> (f32[1,256], bf16[128,64], bf16[1024,64]) {
  %r0 = bf16[128,64]{1,0} parameter(0)
  %r1 = bf16[1024,64]{1,0} parameter(1)
  %r2 = f32[1,256]{1,0} parameter(2)
  %part = bf16[1024,64]{1,0} all-gather(%r0), channel_id=3, replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}
  %twice = f32[1,256]{1,0} add(%r2, %r2)
  ROOT %r = (f32[1,256]{1,0}, bf16[128,64]{1,0}, bf16[1024,64]{1,0}) tuple(%twice, %r0, %r1)
}

ENTRY %main (a: bf16[128,64], s: bf16[8,1024], u: f32[16,256], n: s32[]) -> f32[16,256] {
  %a = bf16[128,64]{1,0} parameter(0)
  %s = bf16[8,1024]{1,0} parameter(1)
  %u = f32[16,256]{1,0} parameter(2)
  %n = s32[] parameter(3)
  %start = (s32[], bf16[128,64]{1,0}) tuple(%n, %a)
  %loop = (s32[], bf16[128,64]{1,0}) while(%start), condition=%condition, body=%body
  %row = bf16[1,1024]{1,0} fusion(%s, %n), kind=kLoop, calls=%sliced, metadata={op_name="x(y)"}
  %line = f32[1,256]{1,0} convert(%row)
  %whole = bf16[1024,64]{1,0} custom-call()
  %first = (f32[1,256]{1,0}, bf16[128,64]{1,0}, bf16[1024,64]{1,0}) fusion(%a, %whole, %line), PASSING, calls=%beside
  %second = (f32[1,256]{1,0}, bf16[128,64]{1,0}, bf16[1024,64]{1,0}) fusion(%a, %whole, %line), PASSING, calls=%beside
  %fetch = ((bf16[8,1024]{1,0}), bf16[2,1024]{1,0:S(1)}, s32[]{:S(2)}) slice-start(%s), slice={[0:2], [0:1024]}
  %fetched = bf16[2,1024]{1,0:S(1)} slice-done(%fetch)
  %sum = f32[1,256]{1,0} all-reduce(%line), channel_id=2, replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %out = f32[16,256]{1,0} fusion(%u, %sum, %n), kind=kLoop, calls=%updated
}
""".replace("PASSING", "kind=kOutput, output_to_operand_aliasing={{1}: (0, {}), {2}: (1, {})}")


def test_collectives_in_loops_count_as_often_as_they_run():
    gather, spread, reduce = read_traffic(PROGRAM).collectives
    assert (spread.kind, spread.ways, spread.times) == ("all-gather", 8, 1)  # over two fusions
    assert (gather.kind, gather.shapes, gather.ways, gather.times) == ("all-gather", ((1024, 64),), 8, 5)
    assert gather.size == 1024 * 64 * 2
    # A device sends its eighth to seven others.
    assert gather.sent == 5 * 1024 * 64 * 2 * 7 / 8
    assert (reduce.kind, reduce.ways, reduce.times) == ("all-reduce", 4, 1)
    assert reduce.sent == 2 * 1024 * 3 / 4


def test_memory_traffic_leaves_out_what_is_not_touched():
    in_loop = 5 * 128 * 64 * 2  # the gathered weight itself lies on the chip
    sliced = 2 * 1024 * 2 + 4  # one row read and written, and the index
    converted = 1024 * 2 + 1024
    reduced = 2 * 1024
    updated = 2 * 1024 + 4  # the new row read and written; the rest stays in place
    fetched = 2 * 1024 * 2  # two of eight rows, read into the chip's memory
    spread = 1024 * 64 * 2 + 128 * 64 * 2  # once, and not by the fusions that the weight goes through
    beside = 1024 * 64 * 2 + 2 * (1024 + 1024)  # what makes its room, and what the fusions compute
    parts = in_loop, sliced, converted, reduced, updated, fetched, spread, beside
    assert read_traffic(PROGRAM).memory == sum(parts)
