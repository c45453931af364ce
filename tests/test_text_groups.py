"""Tests that texts grouped by length have the features, loss and gradients of full length."""

import contextlib
import dataclasses
import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from disco_jax.config import default
from disco_jax.config.text_groups import AUTO, parse_text_groups
from disco_jax.config.validation import problems_of
from disco_jax.data.caption_lengths import caption_lengths
from disco_jax.data.source import BadSample, Joined, Sample
from disco_jax.data.tokenizer import CLIPTokenizer
from disco_jax.errors import UserError
from disco_jax.evaluation.encoder import Encoder
from disco_jax.mesh import place_batch, state_sharding
from disco_jax.models import CLIPConfig, TextConfig, VisionConfig, abstract_model, preset
from disco_jax.models.build import model_config
from disco_jax.models.group_choice import choose_text_groups, groups_of, typical_lengths
from disco_jax.plan.flops import matmul_flops
from disco_jax.runs.workdir import check_same
from disco_jax.step.gradients import (
    by_microbatches,
    make_model_fns,
    share_too_long,
    sum_over_devices,
    whole_batch,
)
from disco_jax.step.host_step import HostStep
from disco_jax.step.optimizer import make_optimizer
from disco_jax.step.state import TrainState, abstract_state
from disco_jax.step.train_step import make_train_step
from disco_jax.training.text_groups import find_text_groups
from tests.conftest import mesh_of
from tests.test_microbatch import difference

pytestmark = pytest.mark.usefixtures("standard_promotion")

BATCH, CONTEXT, END = 16, 8, 63
GROUPS = "4:0.75"  # the rest have 8 tokens
SHORT = [2, 3, 4, 8]  # fits four texts or any multiple
TOO_LONG = [
    (SHORT * 4, 0),
    ([2] * 4 + [8] * 4 + [2] * 8, 1 / 4),
    ([2, 2, 2, 8] * 2 + [8] * 8, 2 / 4),
]
# devices, devices per copy of the state, samples per device in a microbatch, mode
DIVISIONS = [(8, 2, 0, "scan"), (2, 1, 4, "scan"), (1, 1, 8, "host")]
MODEL = CLIPConfig(
    embed_dim=12,
    vision=VisionConfig(image_size=8, patch_size=8, width=16, layers=1, heads=2),
    text=TextConfig(
        context_length=CONTEXT, vocab_size=64, width=16, layers=2, heads=2, dropout=0.2
    ),
)


def texts(lengths, context=CONTEXT, seed=0):
    """Returns random texts that end after `lengths` tokens, with random tokens after their ends."""
    tokens = np.random.default_rng(seed).integers(1, END, (len(lengths), context))
    tokens[np.arange(len(lengths)), np.array(lengths) - 1] = END
    return tokens.astype(np.int32)


def batch_of(lengths):
    pixels = np.random.default_rng(1).integers(0, 256, (BATCH, 8, 8, 3))
    return {"images": pixels.astype(np.uint8), "tokens": texts(lengths)}


def config_of(microbatch=0, groups=GROUPS):
    config = default()
    config.batch_size, config.microbatch = BATCH, microbatch
    config.model.dtype, config.model.dropout = "float32", MODEL.text.dropout
    config.model.text_groups, config.loss.method = groups, "auto"
    return config


def random_params(model):
    """Returns parameters as large as in training, which compile faster than an initialization."""
    rng = np.random.default_rng(2)
    _, shapes = abstract_model(model)

    def draw(path, x):
        mean = 1 if path[-1].key in ("scale", "logit_scale") else 0
        return (mean + rng.normal(0, 0.2, x.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def state_on(mesh):
    params = jax.tree.map(
        lambda x: jax.device_put(x, state_sharding(mesh, x.shape)), random_params(MODEL)
    )
    return TrainState(jnp.int32(3), params, ())


@functools.cache
def host_step():
    return HostStep(config_of(microbatch=8), MODEL, mesh_of(1))


@contextlib.contextmanager
def compilations():
    """Context manager that yields a list, to which every compilation appends its duration."""
    compiled = []

    def listener(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listener)


@functools.cache
def gradient_fn(devices, fsdp, microbatch, mode, groups=GROUPS):
    """Returns (batch) -> loss and gradients, compiled once for all batches."""
    config, mesh = config_of(microbatch, groups), mesh_of(devices, fsdp)
    state = state_on(mesh)
    if mode == "host":
        step = host_step()
        total = jax.jit(lambda own: sum_over_devices(mesh, own, config.reduce_dtype))

        def by_host(batch):
            loss, own, scalars = step.gradients(state, batch)
            return loss, total(own) | scalars

        return by_host
    make = by_microbatches if microbatch else whole_batch
    gradient = jax.jit(make(config, make_model_fns(config, MODEL, mesh), MODEL, mesh))
    return lambda batch: gradient(state.params, place_batch(batch, mesh), state.step)


# Half of the batches fit. The others have any lengths, and most of them do not fit.
any_lengths = st.lists(st.integers(2, CONTEXT), min_size=BATCH, max_size=BATCH)
fitting = st.permutations(SHORT * (BATCH // 4)) | st.permutations([2] * (BATCH - 1) + [CONTEXT])


@pytest.mark.parametrize(
    "division", [*(pytest.param(d, marks=pytest.mark.slow) for d in DIVISIONS[:2]), DIVISIONS[2]]
)
@hypothesis.settings(max_examples=6, deadline=None, derandomize=True)
@hypothesis.given(lengths=fitting | any_lengths)
def test_gradients_are_those_at_full_length(division, lengths):
    """Dropout is also the same on any devices, in both modes, for texts that fit and that don't."""
    batch = batch_of(lengths)
    got = jax.tree.map(np.asarray, gradient_fn(*division)(batch))
    full = jax.tree.map(np.asarray, gradient_fn(1, 1, 0, "scan", "")(batch))
    assert difference(got, full) < 1e-5


def test_texts_that_do_not_fit_are_counted():
    """Two devices have two microbatches each, of which none, one or two don't fit."""
    groups, mesh = groups_of(GROUPS, 4, MODEL.text), mesh_of(2)
    share = jax.jit(lambda batch: share_too_long(groups, batch, mesh))
    for lengths, expected in TOO_LONG:
        assert float(share(place_batch(batch_of(lengths), mesh))) == expected


def test_the_hosts_loop_counts_and_compiles_once():
    """The count is the same on one device with two microbatches of eight."""
    step, state = host_step(), state_on(mesh_of(1))
    step.gradients(state, batch_of(SHORT * 4))
    with compilations() as compiled:
        for lengths, expected in TOO_LONG[:1] + TOO_LONG[2:]:
            assert np.asarray(step._gradients(state, batch_of(lengths))[3]).tolist() == [expected]
    assert compiled == []


@pytest.mark.parametrize(("groups", "counted"), [(GROUPS, True), ("", False)])
def test_the_share_is_among_the_metrics_where_there_are_groups(groups, counted):
    config, mesh = config_of(groups=groups), mesh_of(1)
    step = make_train_step(config, MODEL, mesh)
    state = abstract_state(MODEL, make_optimizer(config), mesh)
    _, metrics = jax.eval_shape(step, state, batch_of(SHORT * 4))
    assert ("train/long_texts" in metrics) == counted


@pytest.mark.parametrize("trained", [-1, 0, 1])
def test_frozen_blocks_cost_no_gradients(trained):
    """Groups of 7 and 8 tokens cost nearly as much as 8 tokens, whichever blocks are trained."""
    model = dataclasses.replace(MODEL, text=dataclasses.replace(MODEL.text, trained_blocks=trained))
    counts = []
    for groups in ("", "7:0.5"):
        config, mesh = config_of(groups=groups), mesh_of(2)
        gradient = whole_batch(config, make_model_fns(config, model, mesh), model, mesh)
        jaxpr = jax.make_jaxpr(gradient)(random_params(MODEL), batch_of(SHORT * 4), jnp.int32(0))
        counts.append(matmul_flops(jaxpr)["float32"])
    assert 0.9 * counts[0] < counts[1] < counts[0]


def test_memory_falls_though_any_batch_may_be_long():
    """The program also contains the rare path, texts at full length in pieces."""
    sizes = TextConfig(context_length=64, vocab_size=64, width=64, layers=3, heads=1)
    model = dataclasses.replace(MODEL, text=sizes)
    graph, params = abstract_model(model)
    used = []
    for groups in ((), ((16, 8), (32, 6), (64, 2))):

        def total(params, tokens, groups=groups):
            return jnp.sum(nnx.merge(graph, params).encode_text(tokens, None, groups))

        tokens = jax.ShapeDtypeStruct((16, 64), jnp.int32)
        program = jax.jit(jax.grad(total)).lower(params, tokens).compile()
        used.append(program.memory_analysis().temp_size_in_bytes)
    assert used[1] < 0.75 * used[0]


@hypothesis.settings(deadline=None, derandomize=True)
@hypothesis.given(
    pairs=st.dictionaries(st.integers(1, 76), st.floats(0.001, 1), max_size=5),
    count=st.integers(1, 300),
)
def test_any_number_of_texts_is_divided(pairs, count):
    """No short group holds more than the fraction asked for, and no text is lost."""
    fractions = sorted(set(pairs.values()))
    setting = ",".join(f"{n}:{f!r}" for n, f in zip(sorted(pairs), fractions, strict=False))
    groups = groups_of(setting, count, TextConfig())
    if groups:
        assert sum(size for _, size in groups) == count
        assert [n for n, _ in groups] == sorted({n for n, _ in groups})
    for n, fraction in parse_text_groups(setting):
        assert sum(size for length, size in groups if length <= n) <= fraction * count + 1e-5
    assert groups_of(setting, count, preset("ViT-B-16-SigLIP").text) == ()


@pytest.mark.parametrize("count", [16, 64, 512])
@pytest.mark.parametrize("kind", ["web", "equal", "uniform", "full"])
def test_chosen_groups_fit_new_texts_and_pay_off(kind, count):
    rng = np.random.default_rng(0)

    def draw(n):
        if kind == "web":
            return rng.choice(typical_lengths(77), n)
        return {
            "equal": np.full(n, 11),
            "uniform": rng.integers(2, 78, n),
            "full": np.full(n, 77),
        }[kind]

    setting = choose_text_groups(draw(2048), count, 77)
    groups = groups_of(setting, count, TextConfig())
    room = np.repeat(*zip(*groups, strict=True)) if groups else np.full(count, 77)
    late = np.mean([(np.sort(draw(count)) > room).any() for _ in range(1000)])
    assert late <= 0.01
    most = {"web": 0.55, "equal": 0.4, "uniform": 0.95, "full": 1}[kind]
    assert np.mean(room) <= most * 77
    assert (setting == "") == (kind == "full")


def test_typical_lengths_are_as_documented():
    lengths = typical_lengths(77)
    assert np.median(lengths) == 13
    assert np.mean(lengths < 30) == pytest.approx(0.9, abs=0.01)
    assert lengths.min() >= 2
    assert lengths.max() <= 77


class Captions:
    """A source of captions, in which None is a bad sample."""

    fingerprint, problems = "captions", {}

    def __init__(self, captions):
        self.captions = captions

    def __len__(self):
        return len(self.captions)

    def __getitem__(self, index):
        if self.captions[index] is None:
            raise BadSample("unreadable", str(index))
        return Sample(str(index), b"", self.captions[index])


def test_lengths_are_sampled_by_weight_and_bad_samples_left_out(monkeypatch):
    monkeypatch.setattr("disco_jax.data.caption_lengths.SAMPLES", 100)
    tokenizer = CLIPTokenizer(16)
    short, long = Captions(["cat"] * 900), Captions(["a " * 40] * 90 + [None] * 10)
    source = Joined.__new__(Joined)
    source.sources, source.starts = [short, long], [0, 900, 1000]
    data = default().data
    np.testing.assert_array_equal(caption_lengths(source, tokenizer, data), [3] * 90 + [16] * 9)
    data.weights = (1.0, 1.0)
    even = caption_lengths(source, tokenizer, data)
    np.testing.assert_array_equal(even, [3] * 50 + [16] * 45)
    data.weights, data.captions_by_line = (), True
    source.sources, source.starts = [Captions(["cat\na cat"] * 5)], [0, 5]
    np.testing.assert_array_equal(caption_lengths(source, tokenizer, data), [3, 4] * 5)
    source.sources = [Captions([None] * 5)]
    assert not len(caption_lengths(source, tokenizer, data))


def test_auto_is_found_from_the_data_and_siglip_has_none():
    config = default()
    config.batch_size = 8 * 64
    source = Joined.__new__(Joined)
    source.sources, source.starts = [Captions(["a cat"] * 500)], [0, 500]
    found = find_text_groups(config, TextConfig(), source)
    assert found.startswith("8:")
    assert groups_of(found, 64, TextConfig())[0][1] > 50
    config.model.text_groups = "16:0.5"
    assert find_text_groups(config, TextConfig(), source) == "16:0.5"
    assert find_text_groups(config, preset("ViT-B-16-SigLIP").text, source) == ""
    source.sources, source.starts = [Captions([None] * 5)], [0, 5]
    config.model.text_groups = AUTO
    assert find_text_groups(config, TextConfig(), source) == ""


def test_a_run_may_resume_with_other_groups(tmp_path):
    config, other = default(), default()
    other.model.text_groups = "16:0.5"
    check_same(json.loads(config.to_json()), other, tmp_path)


@pytest.mark.parametrize("wrong", ["16", "16:0.5,8:0.9", "16:0.9,32:0.5", "16:2", "16:nan", "x:1"])
def test_mistakes_in_groups_are_told(wrong):
    config = default()
    config.model.text_groups = wrong
    assert [p for p in problems_of(config) if p.startswith(f"model.text_groups is {wrong!r}; it")]


@pytest.mark.parametrize(
    ("name", "groups", "message"),
    [
        ("ViT-B-32", "16:0.5,77:0.9", "lengths must be less than the model's 77 tokens"),
        ("ViT-B-16-SigLIP", "16:0.5", "attends to its padding, so it must be auto or empty"),
    ],
)
def test_groups_that_do_not_suit_the_model_are_told(name, groups, message):
    config = default()
    config.model.name, config.model.text_groups = name, groups
    with pytest.raises(UserError, match=message):
        model_config(config)


def test_short_texts_are_evaluated_short(monkeypatch):
    """Texts of all lengths, over several batches, get the features of full length, in order."""
    sizes = TextConfig(context_length=77, vocab_size=64, width=16, layers=1, heads=2)
    model = dataclasses.replace(MODEL, text=sizes)
    params = random_params(model)
    encoder = Encoder(model, mesh_of(2), 8)
    lengths = np.random.default_rng(0).permutation([*range(2, 78, 4), 77, *[5] * 12])
    tokens = texts(lengths, 77)
    full = encoder.encode_all(encoder.text, params, tokens)
    seen, real = [], encoder.text

    def text(params, tokens):
        seen.append(tokens.shape[1])
        return real(params, tokens)

    monkeypatch.setattr(encoder, "text", text)
    np.testing.assert_allclose(encoder.encode_texts(params, tokens), full, atol=1e-6)
    assert seen == [16, 16, 48, 77]
