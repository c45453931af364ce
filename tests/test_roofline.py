"""Tests the estimated time of a small HLO program against sums worked out by hand."""

import pytest

from disco_jax.plan.accelerators import ACCELERATORS, parse_topology
from disco_jax.plan.hlo import Program
from disco_jax.plan.rates import LAUNCH, Rates, rates_of
from disco_jax.plan.roofline import cudnn_workspace, estimate

# A launch takes 1 s. A device moves 1 byte/s from or to its memory, 2 bytes/s within a host of 4
# devices and 1 byte/s between hosts, and computes 10 FLOP/s in bf16 and 5 in fp32.
RATES = Rates(launch=1.0, bandwidth=1.0, bf16=10.0, fp32=5.0, link=2.0, network=1.0, host=4)

PROGRAM = """HloModule jit_f, is_scheduled=true, num_partitions=4

%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %c = f32[] add(%a, %b)
}

%read_slice (p0: f32[10,4], p1: s32[]) -> f32[4] {
  %p0 = f32[10,4]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,4]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,4}
  %flat = f32[4]{0} bitcast(%slice)
  ROOT %twice = f32[4]{0} add(%flat, %flat)
}

%write_slice (p0.1: f32[10,4], p1.1: f32[4], p2.1: s32[]) -> f32[10,4] {
  %p0.1 = f32[10,4]{1,0} parameter(0)
  %p1.1 = f32[4]{0} parameter(1)
  %row = f32[1,4]{1,0} bitcast(%p1.1)
  %p2.1 = s32[] parameter(2)
  %zero.1 = s32[] constant(0)
  ROOT %update = f32[10,4]{1,0} dynamic-update-slice(%p0.1, %row, %p2.1, %zero.1)
}

%body (state: (s32[], f32[10,4])) -> (s32[], f32[10,4]) {
  %state = (s32[], f32[10,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %rows = f32[10,4]{1,0} get-tuple-element(%state), index=1
  %read = f32[4]{0} fusion(%rows, %i), kind=kLoop, calls=%read_slice
  %write = f32[10,4]{1,0} fusion(%rows, %read, %i), kind=kLoop, calls=%write_slice
  ROOT %next = (s32[], f32[10,4]{1,0}) tuple(%i, %write)
}

%condition (state.1: (s32[], f32[10,4])) -> pred[] {
  %state.1 = (s32[], f32[10,4]{1,0}) parameter(0)
  ROOT %more = pred[] constant(true)
}

%usual (x.1: f32[2,3]) -> f32[2,3] {
  %x.1 = f32[2,3]{1,0} parameter(0)
  ROOT %negated = f32[2,3]{1,0} negate(%x.1)
}

%rare (x.2: f32[2,3]) -> f32[2,3] {
  %x.2 = f32[2,3]{1,0} parameter(0)
  %once = f32[2,3]{1,0} negate(%x.2)
  ROOT %again = f32[2,3]{1,0} negate(%once)
}

ENTRY %main (x: f32[2,3], y: bf16[3,8], rows: f32[10,4], ok: pred[]) -> f32[2,8] {
"""


def seconds(*lines):
    return estimate(
        Program(PROGRAM + "\n".join(f"  {line}" for line in HEAD + lines) + "\n}\n"), RATES
    )


HEAD = (
    "%x = f32[2,3]{1,0} parameter(0)",
    "%y = bf16[3,8]{1,0} parameter(1)",
    "%rows.9 = f32[10,4]{1,0} parameter(2)",
    "%ok = pred[] parameter(3)",
    "%zero.9 = s32[] constant(0)",
)


def test_a_kernel_takes_its_launch_and_its_bytes():
    cost = seconds("ROOT %n = f32[2,3]{1,0} negate(%x)")
    assert (cost.seconds, cost.kernels, cost.bytes) == (1 + 48, 1, 48)


@pytest.mark.parametrize(
    "line",
    [
        '%g = (f32[8,8]{1,0}, s8[999]{0}) custom-call(%y, %y), custom_call_target="__cublas$gemm", '
        'backend_config={"lhs_contracting_dimensions":["0"],"rhs_contracting_dimensions":["0"]}',
        "%g = f32[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={0}, rhs_contracting_dims={0}",
    ],
)
def test_a_matmul_takes_its_flops_if_these_take_longer(line):
    cost = seconds(line)
    assert cost.flops == {"bf16": 2 * 8 * 8 * 3}
    assert cost.bytes == 2 * 48 + 256  # without the workspace
    assert cost.seconds == 1 + max(cost.bytes, 2 * 8 * 8 * 3 / 10)


@pytest.mark.parametrize(
    ("call", "matmuls", "workspace"),
    [("fmhaSoftmax", 2, 0), ("fmhaSoftmaxBackward", 5, 4 * 2 * 6 * 3 * 8)],
)
def test_cudnns_attention_reads_no_logits(call, matmuls, workspace):
    """2 samples, 3 heads, 6 tokens and 8 dimensions per head."""
    array = "bf16[2,6,3,8]{3,2,1,0}"
    lines = [f"%{name} = {array} parameter({i})" for name, i in (("q", 4), ("k", 5), ("v", 6))]
    config = '{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","3","6","6"]}}'
    program = Program(
        PROGRAM
        + "\n".join(f"  {line}" for line in (*HEAD, *lines))
        + f"\n  ROOT %o = ({array}, f32[2,3,6]{{2,1,0}}, u8[0]{{0}}) custom-call(%q, %k, %v), "
        f'custom_call_target="__cudnn${call}", backend_config={config}\n}}\n'
    )
    cost = estimate(program, RATES)
    size = 2 * 6 * 3 * 8
    assert cost.flops == {"bf16": matmuls * 2 * size * 6}
    assert cost.bytes == 4 * 2 * size + 4 * 2 * 3 * 6
    assert cudnn_workspace(program) == workspace


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("%g = f32[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={0}", "matmuls"),
        ('%n = f32[2,3]{1,0} negate(%x), metadata={op_name="jit(f)/mlp/neg"}', "other"),
        (
            '%n = f32[2,3]{1,0} negate(%x), metadata={op_name="transpose(jvp(attention))/neg"}',
            "attention",
        ),
        ('%n = f32[2,3] copy(%x), metadata={op_name="while/body/dynamic_slice"}', "loop copies"),
    ],
)
def test_seconds_are_divided_by_kind(line, kind):
    cost = seconds(line)
    assert cost.spent == {("", kind): cost.seconds}


def test_a_loop_counts_its_turns_and_a_slice_what_it_reads():
    """Each of 10 turns runs two kernels, which both read 16 bytes and the index and write 16."""
    cost = seconds(
        "%state.9 = (s32[], f32[10,4]{1,0}) tuple(%zero.9, %rows.9)",
        "%loop = (s32[], f32[10,4]{1,0}) while(%state.9), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"10"}}',
    )
    assert cost.kernels == 20
    assert cost.bytes == 10 * ((16 + 4 + 16) + (16 + 4 + 16))
    assert cost.seconds == cost.kernels + cost.bytes


def test_an_asynchronous_fusion_takes_what_a_fusion_takes():
    """As jax 0.12's compiler schedules updates of one slice; its result repeats the operands."""
    start = (
        "%s = ((f32[10,4]{1,0}, f32[4]{0}, s32[]), f32[10,4]{1,0}, u32[]) "
        "fusion-start(%rows.9, %v, %zero.9), kind=kLoop, calls=%write_slice"
    )
    plain = "%w = f32[10,4]{1,0} fusion(%rows.9, %v, %zero.9), kind=kLoop, calls=%write_slice"
    value = "%v = f32[4]{0} parameter(4)"
    cost = seconds(value, start, "%w = f32[10,4]{1,0} fusion-done(%s)")
    assert cost == seconds(value, plain)
    assert cost.bytes == 16 + 4 + 16


@pytest.mark.parametrize(
    "branches",
    ["true_computation=%usual, false_computation=%rare", "branch_computations={%rare, %usual}"],
)
def test_a_conditional_counts_as_its_usual_branch(branches):
    assert seconds(f"%c = f32[2,3] conditional(%ok, %x, %x), {branches}").kernels == 1


def test_collectives_run_beside_what_the_compiler_put_between():
    start = (
        "%s = (f32[10,4]{1,0}, f32[40,4]{1,0}) all-gather-start(%rows.9), dimensions={0}, "
        "replica_groups={{0,1,2,3}}"
    )
    done = "%d = f32[40,4]{1,0} all-gather-done(%s)"
    other = "%n = f32[10,4]{1,0} negate(%rows.9)"
    wire, kernel = 1 + 640 * 3 / 4 / 2, 1 + 320
    hidden, bare = seconds(start, other, done), seconds(start, done, other)
    assert hidden.seconds == max(wire, kernel)
    assert bare.seconds == wire + kernel
    assert hidden.collective_seconds == bare.collective_seconds == wire


def test_waiting_for_a_collective_belongs_to_its_part():
    """Nothing is waited for if a kernel of 321 s hides the 241 s of the collective."""
    start = (
        "%s = (f32[10,4]{1,0}, f32[40,4]{1,0}) all-gather-start(%rows.9), dimensions={0}, "
        'replica_groups={{0,1,2,3}}, metadata={op_name="jit(f)/jvp(loss)/all_gather"}'
    )
    other = '%n = f32[10,4]{1,0} negate(%rows.9), metadata={op_name="jit(f)/optimizer/neg"}'
    wire, kernel = 1 + 640 * 3 / 4 / 2, 1 + 320
    bare = seconds(start, "%d = f32[40,4]{1,0} all-gather-done(%s)", other)
    assert bare.spent == {("loss", "communication"): wire, ("optimizer", "other"): kernel}
    hidden = seconds(start, other, "%d = f32[40,4]{1,0} all-gather-done(%s)")
    assert hidden.spent == {("optimizer", "other"): kernel}
    assert bare.by_part() == {"loss": {"communication": wire}, "optimizer": {"other": kernel}}


def test_kernels_without_a_part_belong_to_that_of_their_loop():
    loop = (
        "%loop = (s32[], f32[10,4]{1,0}) while(%state.9), condition=%condition, body=%body, "
        'backend_config={"known_trip_count":{"n":"10"}}'
    )
    state = "%state.9 = (s32[], f32[10,4]{1,0}) tuple(%zero.9, %rows.9)"
    named = f'{loop}, metadata={{op_name="jit(f)/transpose(jvp(image_tower))/while"}}'
    assert {part for part, _ in seconds(state, named).spent} == {"image_tower"}
    assert seconds(state, loop).by_part().keys() == {"rest"}
    inner = PROGRAM.replace(
        "calls=%read_slice", 'calls=%read_slice, metadata={op_name="jit(f)/text_tower/add"}'
    )
    lines = "\n".join(f"  {line}" for line in (*HEAD, state, named))
    spent = estimate(Program(f"{inner}{lines}\n}}\n"), RATES).spent
    assert {part for part, _ in spent} == {"image_tower", "text_tower"}


def test_rates_of_links():
    assert RATES.collective("all-reduce", 80, 4) == 1 + 2 * 80 * 3 / 4 / 2
    assert RATES.collective("all-gather", 80, 8) == 1 + 80 * 7 / 8 / 2  # 4 adapters beat a link
    assert RATES.collective("collective-permute", 80, 4) == 1 + 80 / 2
    assert RATES.collective("collective-permute", 80, 8) == 1 + 80 / 1  # one per host crosses
    rates = rates_of(parse_topology("a100-40gb:16"))
    assert (rates.launch, rates.host) == (LAUNCH, 8)
    assert rates.matmul("bf16") == 0.8 * ACCELERATORS["a100-40gb"].bf16_rate
