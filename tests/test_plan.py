"""Tests the planner's counts against hand calculations, its search, and its command."""

import contextlib
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

from disco_jax.config import default
from disco_jax.errors import UserError
from disco_jax.losses import contrastive_loss
from disco_jax.models import preset
from disco_jax.plan import plans, program
from disco_jax.plan.accelerators import ACCELERATORS, parse_topology, tpu_grid
from disco_jax.plan.compiler import MARGIN, XLA_FLAGS, environment
from disco_jax.plan.flops import matmul_flops
from disco_jax.plan.hlo import Program, collectives
from disco_jax.plan.program import measure, shard_bytes, step_job
from disco_jax.plan.rates import rates_of
from disco_jax.plan.search import largest_batch
from disco_jax.plan.worker import planned_attention
from disco_jax.processes import cli
from tests import small_run
from tests.conftest import ENV, mesh_of

MIB, GIB = 2**20, 2**30
# The compilers for absent GPUs and TPUs are Linux wheels (requirements-plan.txt).
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the compilers are Linux wheels")


@pytest.mark.parametrize(
    ("method", "keep", "factor"),
    [("auto", 0, 6), ("disco", 0, 12), ("ring", 0, 8), ("ring", 2**29, 6.5)],
)
def test_flops_of_the_loss(method, keep, factor):
    """All 4 devices together take `factor` B²D, as derived in docs/losses.md.

    With tiles of 6, 12 of the 16 columns of each hop are kept in the last case.
    """
    batch, dim = 64, 16
    rows = jnp.zeros((batch, dim))

    def loss(image, text, scale):
        return contrastive_loss(
            image, text, scale, mesh=mesh_of(4), method=method, tile=6, keep_bytes=keep
        )

    jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(rows, rows, jnp.float32(1))
    assert matmul_flops(jaxpr) == {"float32": factor * batch**2 * dim}


def test_flops_of_loops_and_branches():
    a = jnp.zeros((4, 4))

    def program(x, flag):
        x, _ = lax.scan(lambda c, _: (c @ a, None), x, length=5)
        x = lax.cond(flag, lambda y: y @ a @ a, lambda y: y @ a @ a @ a, x)
        return x.astype(jnp.bfloat16) @ a.astype(jnp.bfloat16)

    one = 2 * 4**3
    counts = matmul_flops(jax.make_jaxpr(program)(a, True))
    assert counts == {"float32": 7 * one, "bfloat16": one}


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize(("remat", "groups"), [("none", ""), ("full", ""), ("full", "8:0.5")])
def test_flops_of_a_step(remat, groups):
    """The backward pass costs twice the forward pass.

    Rematerialization repeats the blocks except for their last matmul. With groups, half of the
    texts have 8 tokens instead of 32.
    """
    config = tiny_config(remat)
    config.model.text_groups = groups
    batch, model = config.batch_size, preset("tiny")
    blocks = last = patches = projections = 0
    lengths = [8, 32] if groups else [32, 32]
    for tower, halves in ((model.vision, [10, 10]), (model.text, lengths)):
        width = tower.width
        for tokens in halves:
            rows = batch // 2 * tokens
            weights = 2 * rows * width**2 * (4 + 2 * tower.mlp_ratio)
            attention = 2 * 2 * rows * tokens * width
            blocks += tower.layers * (weights + attention)
            last += tower.layers * 2 * rows * width**2 * tower.mlp_ratio
        projections += 2 * batch * width * model.embed_dim
    patches = 2 * batch * 9 * (16 * 16 * 3) * model.vision.width  # no gradients of the images
    loss = 6 * batch**2 * model.embed_dim  # all logits are kept
    expected = 3 * (blocks + projections) + 2 * patches + loss
    if remat == "full":
        expected += blocks - last
    job = step_job(config, mesh_of(4))
    traced = job.function.trace(*job.arguments)
    assert sum(matmul_flops(traced.jaxpr).values()) == expected


@pytest.mark.parametrize("causal", [False, True])
def test_flops_of_cudnns_attention(causal, monkeypatch):
    """Two matmuls forward; backward, the logits again and four gradients. A mask saves nothing."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    for name in ("check_cudnn_version", "check_compute_capability"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))  # restored afterwards
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", None)
    config = default()
    assert planned_attention(config, parse_topology("cpu:8")) == "xla"
    assert planned_attention(config, parse_topology("v5e:8")) == "xla"
    assert planned_attention(config, parse_topology("a100-40gb:8")) == "cudnn"
    config.model.dtype = "float32"
    assert planned_attention(config, parse_topology("a100-40gb:8")) == "xla"

    def total(q):
        return jnp.sum(
            jax.nn.dot_product_attention(q, q, q, is_causal=causal, implementation="cudnn")
        )

    one = 2 * (3 * 4 * 6 * 6 * 16)  # samples, heads, queries, keys, dimensions per head
    q = jax.ShapeDtypeStruct((3, 6, 4, 16), jnp.bfloat16)
    assert matmul_flops(jax.make_jaxpr(total)(q)) == {"bfloat16": 2 * one}
    assert matmul_flops(jax.make_jaxpr(jax.grad(total))(q)) == {"bfloat16": 7 * one}


@jax.numpy_dtype_promotion("standard")
@pytest.mark.parametrize("temporaries", [None, 10**12])
def test_a_phase_that_is_too_large_for_the_compiler(temporaries, monkeypatch):
    """TPU compilers refuse programs that do not fit, and mostly say what they would need."""
    config = tiny_config("none")
    config.microbatch, config.microbatch_mode = 2, "host"

    def measure(job, rates):
        return {
            "step_flops": 1,
            "flops_by_dtype": {"float32": 1},
            "temp_bytes": temporaries,
            "peak_bytes": temporaries,
            "argument_bytes": 1,
        }

    monkeypatch.setattr(program, "measure", measure)
    row = program.measure_step(config, mesh_of(4), rates_of(parse_topology("cpu:8")))
    assert row["phase"] == "prepare"
    assert (row["peak_bytes"] is None) == (temporaries is None)
    if temporaries:  # beside the optimizer's state
        assert row["peak_bytes"] > temporaries


@jax.numpy_dtype_promotion("standard")
def test_bytes_of_the_state():
    """fp32 parameters with Adam's two moments of each, and a batch split over 4 devices."""
    config = tiny_config("none")
    job = step_job(config, mesh_of(4))
    count = sum(x.size for x in jax.tree.leaves(job.parts["param"]))
    assert shard_bytes(job.parts["param"]) == 4 * count
    assert 8 * count <= shard_bytes(job.parts["optimizer"]) <= 8 * count + 64
    image, tokens = 48 * 48 * 3, 4 * 32
    assert shard_bytes(job.parts["batch"]) == config.batch_size // 4 * (image + tokens)


def test_collectives_are_counted_with_their_loops():
    mesh = mesh_of(4)

    def local(x):
        def turn(carry, _):
            return lax.ppermute(carry, "data", [(i, (i + 1) % 4) for i in range(4)]) + 1, None

        x, _ = lax.scan(turn, x, length=3)
        return lax.psum_scatter(lax.all_gather(x, "data", tiled=True), "data", tiled=True)

    program = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=P("data"), out_specs=P("data")))
    text = program.lower(jnp.zeros((4 * 6, 5))).compile().as_text()
    piece = 6 * 5 * 4
    assert collectives(Program(text)) == {
        "all-gather": {"count": 1, "bytes": 4 * piece},
        "reduce-scatter": {"count": 1, "bytes": 4 * piece},
        "collective-permute": {"count": 3, "bytes": 3 * piece},
    }


def test_topologies():
    assert parse_topology("a100-40gb:8").hosts == 1
    assert parse_topology("a100-40gb:64").hosts == 8
    assert parse_topology("h200:4", hosts=2).hosts == 2
    assert parse_topology("v5e:16").hosts == 4
    assert tpu_grid(ACCELERATORS["v5e"], 8) == (2, 4)
    assert tpu_grid(ACCELERATORS["v5p"], 4) == (2, 2, 1)
    assert tpu_grid(ACCELERATORS["v5p"], 64) == (4, 4, 4)
    assert tpu_grid(ACCELERATORS["v6e"], 256) == (16, 16)


@pytest.mark.parametrize(
    ("text", "hosts", "message"),
    [
        ("a100-40g:8", None, "did you mean a100-40gb"),
        ("a100-40gb:none", None, "a100-40gb:8"),
        ("a100-40gb:0", None, "a100-40gb:8"),
        ("a100-40gb:8", 3, "--hosts"),
        ("v5e:6", None, "1, 4, 8, 16"),
        ("v5p:8", 1, "on each"),
    ],
)
def test_bad_topologies_are_told(text, hosts, message):
    with pytest.raises(UserError, match=message):
        parse_topology(text, hosts)


def test_the_largest_batch_is_reported_with_the_least_recomputation(monkeypatch):
    """The three last settings need the same memory here, and the first of them wins."""
    cost = {"none": 20, "dots": 10, "branches": 4, "full": 4, "offload": 4}
    usable = 4 * 4096

    class FakeCompiler(contextlib.nullcontext):
        def compile(self, config, **_):
            assert config.model.image_remat == config.model.text_remat
            peak = cost[config.model.image_remat] * config.batch_size
            return {
                "batch_size": config.batch_size,
                "remat": config.model.image_remat,
                "fits": peak <= usable,
                "peak_bytes": peak,
                "capacity_bytes": usable,
                "margin_bytes": 0,
            }

    monkeypatch.setattr(plans, "Compiler", lambda topology: FakeCompiler(FakeCompiler()))
    found = plans.find_max_batch(default(), parse_topology("a100-40gb:8"), [64], ["ring"])
    assert [(row["batch_size"], row["remat"]) for row in found] == [(4096, "branches")] * 2


@pytest.mark.parametrize("devices", [1, 6, 8])
@pytest.mark.parametrize("usable", [3, 999, 40_000, 10**6])
def test_search_finds_the_largest_batch(devices, usable):
    """Memory has a fixed part and a part that grows not quite linearly with the batch."""

    def row(batch):
        peak = 10 + batch + batch**2 // 10**7
        fits = peak <= usable
        limits = {"capacity_bytes": usable, "margin_bytes": 0}
        return {"batch_size": batch, "peak_bytes": peak, "fits": fits} | limits

    best, rows = largest_batch(row, devices, start=1024)
    if best is None:
        assert not row(devices)["fits"]
    else:
        assert best["fits"]
        assert best["batch_size"] % devices == 0
        above = best["batch_size"] + max(best["batch_size"] // 8, devices)
        assert not row(above)["fits"]
    assert len(rows) < 25


@pytest.mark.slow
def test_command_ends_in_rows(tmp_path):
    """The loss alone on fake CPU devices gives a table, a chart, and JSON as the last line."""
    command = "-m disco_jax.plan --loss_only --topology=cpu:2 --dim=16 --json"
    chart = tmp_path / "chart.png"
    done = run(*command.split(), "--compare=disco,ring", "--batch_size=64,128", f"--chart={chart}")
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [(row["method"], row["batch_size"]) for row in rows] == [
        ("disco", 64),
        ("disco", 128),
        ("ring", 64),
        ("ring", 128),
    ]
    assert rows[0]["step_flops"] == 12 * 64**2 * 16
    assert rows[0]["argument_bytes"] == 2 * 32 * 16 * 4 + 4
    assert rows[0]["fits"]
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--loss_only --topology=a100", "--topology: 'a100' is not one of"),
        ("--loss_only --topology=cpu:8 --batch_size=100", "is not divisible by the 8 devices"),
        ("--loss_only --topology=cpu:8 --compare=dense", "--compare: 'dense' is not one of"),
        ("--loss_only --config.loss.method=ring", "needs a --config=FILE"),
        (
            "--loss_only=True --topology=cpu:8 --find_max_batch --batch_size=8,16",
            "--find_max_batch starts from one --batch_size",
        ),
        ("--loss_only --topology=cpu:8 --find_fastest", "--find_fastest plans whole steps"),
        ("--loss_only --topology=cpu:8 --time_chart=x.png", "no time can be estimated"),
        ("--loss_only", "--topology=NAME:COUNT is missing"),
        ("--topology=cpu:8", "--config=FILE is missing"),
    ],
)
def test_mistakes_end_in_one_line(flags, message):
    done = run("-m", "disco_jax.plan", *flags.split())
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@needs_linux
@pytest.mark.parametrize(
    "start",
    [
        "from disco_jax.processes import cli; cli.guard(lambda: print(mesh.make_mesh()))",
        "import disco_jax\n"
        "try: disco_jax.load('nothing')\n"
        "except Exception: print(mesh.make_mesh())",
    ],
)
def test_the_wheels_change_no_ordinary_start(start):
    """JAX uses the CPU and prints nothing, though plug-ins for absent devices are installed."""
    done = run("-c", f"from disco_jax import mesh\n{start}", env=ENV)
    assert "'data': " in done.stdout
    assert done.stderr == ""


def test_the_users_flags_for_xla_are_kept(monkeypatch):
    """Training compiles with the user's flags too. Without any, only the planner's are used."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=true")
    assert environment()["XLA_FLAGS"].split() == [
        "--xla_gpu_enable_latency_hiding_scheduler=true",
        *XLA_FLAGS.split(),
    ]
    monkeypatch.delenv("XLA_FLAGS")
    assert environment()["XLA_FLAGS"] == XLA_FLAGS


def test_what_fits_leaves_room_inside_jaxs_pool():
    assert 1 - MARGIN <= cli.MEMORY_FRACTION - 0.03 + 1e-9


@jax.numpy_dtype_promotion("standard")
def test_measures_agree_with_the_compiler():
    """The bytes of the arguments, counted from their shapes, equal those that XLA reports."""
    job = step_job(tiny_config("none"), mesh_of(4))
    row = measure(job, rates_of(parse_topology("cpu:8")))
    parts = row["param_bytes"] + row["optimizer_bytes"] + row["batch_bytes"]
    assert row["argument_bytes"] - parts == 4  # the step number


def tiny_config(remat):
    config = default()
    config.batch_size = 16
    config.model.name = "tiny"
    config.model.dtype = "float32"
    config.model.image_remat = config.model.text_remat = remat
    config.loss.method = "ring"
    return config


def run(*arguments, env=None):
    return subprocess.run(
        [sys.executable, *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_a_teachers_parameters_are_held_as_well(tmp_path):
    """All of them, on every device: the bytes of the tensors in its file."""
    made = small_run.make(tmp_path, samples=1)
    config = small_run.config_of(made, distill__teacher=str(made / "model"))
    row = program._with_teacher(config, {"peak_bytes": 7})
    tensors = load_file(made / "model" / "model.safetensors").values()
    assert row["teacher_bytes"] == sum(x.nbytes for x in tensors)
    assert row["peak_bytes"] == 7 + row["teacher_bytes"]
