"""What the parser counts in compiled programs, against what they are known to do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sora_jax.planning import hlo, hlo_text
from sora_jax.runtime import sharding


def report_of(function, *args, chips=1, **kwargs):
  text = jax.jit(function, **kwargs).lower(*args).compile().as_text()
  return hlo.analyze(text, chips)


def test_a_matmul_counts_two_flops_a_multiply_add():
  report = report_of(jnp.matmul, jnp.ones((64, 96)), jnp.ones((96, 128)))
  assert report.matmul_flops == 2 * 64 * 96 * 128


def test_a_scan_counts_as_often_as_it_runs():
  def loop(x, kernels):
    return jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, kernels)[0]

  report = report_of(loop, jnp.ones((64, 32)), jnp.ones((17, 32, 32)))
  assert report.matmul_flops == 17 * 2 * 64 * 32 * 32
  assert set(report.trips.values()) == {17}


def test_nested_loops_multiply():
  def inner(x, k):
    return jax.lax.fori_loop(0, 5, lambda _, y: y @ k, x)

  def outer(x, k):
    return jax.lax.fori_loop(0, 3, lambda _, y: inner(y, k) + 1, x)

  report = report_of(outer, jnp.ones((16, 16)), jnp.ones((16, 16)))
  assert report.matmul_flops == 3 * 5 * 2 * 16**3


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_a_loop_runs_as_often_as_its_condition_says(kind):
  text = f"""HloModule m
%body (x: ({kind}[], f32[8,8])) -> ({kind}[], f32[8,8]) {{
  %x = ({kind}[], f32[8,8]{{1,0}}) parameter(0)
  %i = {kind}[] get-tuple-element(%x), index=0
  %y = f32[8,8]{{1,0}} get-tuple-element(%x), index=1
  %z = f32[8,8] dot(%y, %y), lhs_contracting_dims={{1}}, rhs_contracting_dims={{0}}
  ROOT %t = ({kind}[], f32[8,8]{{1,0}}) tuple(%i, %z)
}}

%condition (x.1: ({kind}[], f32[8,8])) -> pred[] {{
  %x.1 = ({kind}[], f32[8,8]{{1,0}}) parameter(0)
  %i.1 = {kind}[] get-tuple-element(%x.1), index=0
  %n = {kind}[]{{:T(128)}} constant(7)
  ROOT %less = pred[] compare(%i.1, %n), direction=LT
}}

ENTRY %main (a: ({kind}[], f32[8,8])) -> ({kind}[], f32[8,8]) {{
  %a = ({kind}[], f32[8,8]{{1,0}}) parameter(0)
  ROOT %w = ({kind}[], f32[8,8]{{1,0}}) while(%a), condition=%condition, body=%body
}}
"""
  assert hlo.analyze(text, 1).matmul_flops == 7 * 2 * 8**3


def test_convolutions_count_the_taps_inside():
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 1),
    padding=((1, 1), (1, 1)),
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  report = report_of(convolve, jnp.ones((2, 9, 7, 4)), jnp.ones((3, 3, 4, 8)))
  # 3 taps for each pixel along an axis, but for one at each border.
  taps = (3 * 9 - 2) * (3 * 7 - 2)
  assert report.matmul_flops == 2 * taps * 2 * 4 * 8


def conv_text(window):
  return f"""HloModule m
ENTRY %main (a: f32[1,8,4], b: f32[8,4,16]) -> f32[1,8,16] {{
  %a = f32[1,8,4]{{2,1,0}} parameter(0)
  %b = f32[8,4,16]{{2,1,0}} parameter(1)
  ROOT %c = f32[1,8,16]{{2,1,0}} convolution(%a, %b), window={{{window}}}, \
dim_labels=b0f_0io->b0f
}}
"""


def test_a_batched_matmul_in_the_form_of_a_convolution():
  # The form of the TPU compiler: 8 batches, of which each meets its own kernel only.
  window = "size=8 stride=7 pad=0_0 lhs_dilate=8"
  report = hlo.analyze(conv_text(window), 1)
  assert report.matmul_flops == 2 * 8 * 4 * 16


def place(mesh, shape, spec, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def test_collectives_of_a_sharded_matmul():
  mesh = sharding.make_mesh(fsdp=8)
  x = place(mesh, (64, 256), P("fsdp"))
  kernel = place(mesh, (256, 512), P("fsdp"))
  out = NamedSharding(mesh, P("fsdp"))
  report = report_of(jnp.matmul, x, kernel, chips=8, out_shardings=out)
  gather = report.collectives["all-gather"]
  assert (gather.runs, gather.groups) == (1, {8})
  assert gather.bytes == 256 * 512 * 4
  assert gather.wire == gather.bytes * 7 / 8


def test_an_all_reduce_sends_everything_twice():
  mesh = sharding.make_mesh(fsdp=8)
  report = report_of(
    lambda x: jnp.sum(x, axis=0),
    place(mesh, (8, 1024), P("fsdp")),
    chips=8,
    out_shardings=NamedSharding(mesh, P()),
  )
  reduce = report.collectives["all-reduce"]
  assert reduce.wire == 2 * 7 / 8 * 1024 * 4


FUSED = """HloModule m
%all-reduce-scatter.1 (input: bf16[512,64]) -> bf16[128,64] {
  %input = bf16[512,64]{1,0} parameter(0)
  %r = bf16[512,64]{1,0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %s = bf16[128,64]{1,0} dynamic-slice(%r), dynamic_slice_sizes={128,64}
}

ENTRY %main (a: bf16[512,64]) -> bf16[128,64] {
  %a = bf16[512,64]{1,0} parameter(0)
  %attend.3 = bf16[512,64]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", \
frontend_attributes={kernel_metadata={
"x":"y"
}}
  ROOT %f = bf16[128,64]{1,0} fusion(%attend.3), kind=kCustom, \
calls=%all-reduce-scatter.1
}
"""


def test_reduce_scatters_and_kernels_of_the_tpu_compiler():
  report = hlo.analyze(FUSED, 16, lambda name, type_text, rest: 100.0)
  scatter = report.collectives["reduce-scatter"]
  assert (scatter.runs, scatter.groups) == (1, {4})
  assert scatter.wire == 3 / 4 * 512 * 64 * 2
  assert report.kernels["attend"] == hlo.Kernel(launches=1.0, flops=100.0)


ASYNC = """HloModule m
ENTRY %main (a: bf16[8,64]) -> bf16[32,64] {
  %a = bf16[8,64]{1,0} parameter(0)
  %s = (bf16[8,64]{1,0}, bf16[32,64]{1,0}) all-gather-start(%a), replica_groups=[2,4]
  %t = bf16[8,64]{1,0} tanh(%a), backend_config={"estimated_cycles":"CYCLES"}
  ROOT %d = bf16[32,64]{1,0} all-gather-done(%s)
}
"""


@pytest.mark.parametrize("cycles", [0, 70])
def test_wire_is_hidden_where_work_is_scheduled_inside(cycles):
  report = hlo.analyze(ASYNC.replace("CYCLES", str(cycles)), 8)
  gather = report.collectives["all-gather"]
  assert gather.wire == 3 / 4 * 32 * 64 * 2
  assert gather.hidden == (gather.wire if cycles else 0.0)


BETWEEN_SLICES = """HloModule m
ENTRY %main (a: f32[64,8]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %all = token[] after-all()
  %s = (f32[64,8]{1,0}, u32[]{:S(2)}, token[]) send(%a, %all), channel_id=2, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="r_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %r = (f32[64,8]{1,0}, u32[]{:S(2)}, token[]) recv(%all), channel_id=1, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_host_transfer_rendezvous="r_0",_xla_megascale_transfer_type="ALL_REDUCE"}
  %t = f32[64,8]{1,0} tanh(%a), backend_config={"estimated_cycles":"CYCLES"}
  %sd = token[] send-done(%s), channel_id=2
  %rd = (f32[64,8]{1,0}, token[]) recv-done(%r), channel_id=1
  ROOT %o = f32[64,8]{1,0} get-tuple-element(%rd), index=0
}
"""


@pytest.mark.parametrize("cycles", [0, 70])
def test_what_slices_send_each_other(cycles):
  report = hlo.analyze(BETWEEN_SLICES.replace("CYCLES", str(cycles)), 8)
  traffic = report.collectives["network-all-reduce"]
  assert (traffic.runs, traffic.wire) == (1, 64 * 8 * 4)
  assert traffic.hidden == (traffic.wire if cycles else 0.0)
  assert traffic.exposed[tuple(range(8))] == traffic.wire - traffic.hidden


def test_other_text_is_an_error():
  with pytest.raises(ValueError, match="ENTRY"):
    hlo_text.parse("module @jit_f {}")


def test_bytes_of_types():
  assert hlo_text.num_bytes("(f32[2,3]{1,0:T(8,128)}, bf16[4], pred[], s4[6])") == (
    24 + 8 + 1 + 3
  )
  assert np.isclose(hlo_text.num_bytes("f8e4m3fn[10]"), 10)


@pytest.mark.parametrize(
  "text, group",
  [
    ("replica_groups={{0,2},{1,3}}, use_global", (0, 2)),
    ("replica_groups=[2,4]", (0, 1, 2, 3)),
    ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b':(2)2}", (0, 1, 4, 5)),
    ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
    ("replica_groups={}", tuple(range(8))),
  ],
)
def test_groups_of_chips(text, group):
  assert hlo_text.chip_group(text, 8) == group


@pytest.mark.parametrize("between, hidden", [("dot", 1.0), ("copy", 0.0)])
def test_collectives_of_the_sparse_core(between, hidden):
  """They are calls of calls; from the update on, beside what is computed till done."""
  dot = (
    "%dot.1 = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, "
    'rhs_contracting_dims={0}, backend_config={"estimated_cycles":"100"}'
  )
  work = {"dot": dot, "copy": "%copy.1 = f32[8,8]{1,0} copy(%x)"}[between]
  thread = 'async_execution_thread="sparsecore", calls=%async_computation.4'
  text = f"""HloModule m
%called_computation.1 (p: f32[2,8]) -> f32[8,8] {{
  %p = f32[2,8]{{1,0}} parameter(0)
  ROOT %all-gather.9 = f32[8,8]{{1,0}} all-gather(%p), replica_groups=[1,4]<=[4]
}}, execution_thread="sparsecore"

%async_computation.4 (q: f32[2,8]) -> f32[8,8] {{
  %q = f32[2,8]{{1,0}} parameter(0)
  ROOT %custom-call.1 = f32[8,8]{{1,0}} custom-call(%q), custom_call_target="x", \
called_computations={{%called_computation.1}}
}}, execution_thread="sparsecore"

ENTRY %main (x: f32[8,8], y: f32[2,8]) -> f32[8,8] {{
  %x = f32[8,8]{{1,0}} parameter(0)
  %y = f32[2,8]{{1,0}} parameter(1)
  %gather-start = ((), (), (s32[8]{{0}})) async-start(), {thread}
  {dot.replace("dot.1", "dot.0")}
  %gather-update = ((f32[2,8]), f32[8,8], s32[8]) async-update(%gather-start, %y)
  {work}
  ROOT %gather-done = f32[8,8]{{1,0}} async-done(%gather-update)
}}
"""
  traffic = hlo.analyze(text, 4).collectives["all-gather"]
  assert traffic.runs == 1 and traffic.groups == {4}
  assert traffic.wire == 3 / 4 * 8 * 8 * 4
  assert traffic.hidden == hidden * traffic.wire
