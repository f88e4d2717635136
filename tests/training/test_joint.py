import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from jax.sharding import AbstractMesh

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.prompts import PromptTemplates, build_reconstructor_prompt, build_verbalizer_prompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer
from nla_jax.lm.lora import FrozenBase, LoraConfig, init_adapters
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.mesh import make_mesh, tree_shardings
from nla_jax.training.joint import Round
from nla_jax.training.round_programs import RLConfig, RoundPrograms, optimizers, sampling_weights
from nla_jax.training.state import TrainState

BATCHES = np.random.default_rng(0).standard_normal((4, 2, 32)).astype(np.float32)
AXES = ("data", "fsdp", "tensor")
COMPILATION = "/jax/core/compile/jaxpr_trace_duration"


@pytest.fixture(scope="module")
def rounds(tiny_lm):
    """Metrics of four rounds on two blocks of the tiny model, and how many programs each round traced."""
    config = dataclasses.replace(tiny_lm.config, num_layers=2)
    params = {name: tiny_lm.params[name] for name in ("embed", "blocks_0", "blocks_1", "final_norm")}
    templates = PromptTemplates(verbalizer="Vector: {injection_char}")
    av_prompt = build_verbalizer_prompt(tiny_lm.tokenizer, templates)
    verbalizer = Verbalizer(config, av_prompt, InjectionConfig(), 3.0)
    ar_prompt = build_reconstructor_prompt(tiny_lm.tokenizer, templates)
    reconstructor = Reconstructor(config.truncated(0), ar_prompt)
    codec = Autoencoder(tiny_lm.tokenizer, verbalizer, reconstructor, 12, 32)
    rl = RLConfig(activations=2, group=3, length_buckets=1)
    trained = {"av": verbalizer.init(params), "ar": reconstructor.init(params)}
    reference = jax.jit(verbalizer.frozen)(trained["av"])
    states = {name: TrainState.create(trained[name], optimizer) for name, optimizer in optimizers(rl).items()}
    mesh = make_mesh()
    states = jax.device_put(states, tree_shardings(states, mesh))
    run_round = Round(rl, codec, reference, mesh, jax.random.key(0))

    events, traced, metrics = [], [], []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    for index, activations in enumerate(BATCHES):
        events.clear()
        states, to_come = run_round(states, {"activations_BD": activations}, index)
        traced.append(events.count(COMPILATION))
        metrics.append(to_come())
    return codec, metrics, traced


def test_what_samples_with_adapters_shares_a_base_in_compute_dtype(tiny_lm):
    config = dataclasses.replace(tiny_lm.config, dtype="bfloat16")
    prompt = build_verbalizer_prompt(
        tiny_lm.tokenizer, PromptTemplates(verbalizer="Vector: {injection_char}")
    )
    verbalizer = Verbalizer(config, prompt, InjectionConfig(), 3.0)
    lm = jax.tree.map(lambda x: x.astype(config.compute_dtype), tiny_lm.params)
    fresh = init_adapters(LoraConfig(rank=4), {"lm": lm}, jax.random.key(0))
    trained = jax.tree.map(lambda x: 0.1 * jax.random.normal(jax.random.key(1), x.shape), fresh)

    def weights(lm, trained):
        return sampling_weights(
            verbalizer, FrozenBase(lm, 2.0).with_adapters(trained), make_mesh(), gather=True
        )

    shared, copied = jit_aliasing(weights)(lm, trained), jax.jit(weights)(lm, trained)
    base = flatten_dict(lm, sep="/")
    anew = {name for name, x in flatten_dict(shared["lm"], sep="/").items() if x is not base.get(name)}
    # The head is the tied embedding, transposed.
    assert anew == {*flatten_dict(trained["lm"], sep="/"), "lm_head/kernel"}
    sample = jax.jit(
        lambda weights: verbalizer.write(
            weights,
            *verbalizer.read(weights, jnp.asarray(BATCHES[0])),
            jax.random.key(1),
            group=2,
            max_tokens=8,
        )
    )
    for ours, theirs in zip(*(jax.tree.leaves(sample(x)) for x in (shared, copied)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_programs_are_made_without_threads_and_without_measuring_the_device(rounds, monkeypatch):
    def refuse(dtype: str) -> float:
        raise AssertionError("the device was measured")

    monkeypatch.setattr("nla_jax.training.stopwatch.matmul_peak", refuse)
    codec, threads = rounds[0], threading.active_count()
    RoundPrograms(RLConfig(), codec.verbalizer, codec.reconstructor, 12, AbstractMesh((2, 2, 2), AXES))
    # Threads of tests before this one may end meanwhile.
    assert threading.active_count() <= threads
    with pytest.raises(AssertionError, match="the device was measured"):
        Round(RLConfig(), codec, {}, make_mesh(), jax.random.key(0))


def test_nothing_is_compiled_after_the_first_round(rounds):
    _, _, traced = rounds
    assert traced[0] > 5 and traced[1:] == [0, 0, 0]


def test_speed_of_every_phase_is_logged_beside_the_metrics(rounds):
    codec, metrics, _ = rounds
    row = metrics[-1]
    phases = ("prefill", "decode", "reference", "ar_update", "av_update")
    seconds = {phase: row[f"speed/{phase}_seconds"] for phase in phases}
    assert all(value > 0 for value in seconds.values()) and row["speed/texts_seconds"] > 0
    # Phases follow each other; between them is at most the host's work on texts and its dispatching.
    assert sum(seconds.values()) <= row["speed/seconds"] + 1e-9
    assert row["speed/rollouts_per_second"] == pytest.approx(6 / row["speed/seconds"])
    tokens = round(row["length_mean"] * 6)
    assert row["speed/decode_tokens_per_second"] * seconds["decode"] == pytest.approx(tokens)
    # All phases are measured against one peak, so model FLOPs are proportional to utilisation times seconds.
    verbalizer = codec.verbalizer
    expected = 3 * verbalizer.forward_flops(2, 6, row["length_mean"]) / verbalizer.forward_flops(2, 2, 0)
    used = {phase: row[f"speed/{phase}_mfu"] * seconds[phase] for phase in ("prefill", "av_update")}
    assert used["av_update"] / used["prefill"] == pytest.approx(expected)


def test_reference_starts_equal_to_the_policy(rounds):
    _, metrics, _ = rounds
    assert abs(metrics[0]["kl"]) < 1e-6 and metrics[0]["sampler_trainer_logprob_diff"] < 1e-4


def test_explanations_are_cut_at_lengths_that_groups_share_and_rounds_draw_anew(rounds, monkeypatch):
    codec = rounds[0]
    monkeypatch.setattr("nla_jax.training.stopwatch.matmul_peak", lambda dtype: 1.0)
    text = "a list of functions and how to parse a string"
    monkeypatch.setattr(
        Autoencoder, "decode", lambda self, tokens_BT, *_: [text] * (len(tokens_BT) - 1) + [None]
    )
    config = RLConfig(activations=8, group=2, cut=(1, 5))
    cutting = Round(config, codec, {}, make_mesh(), jax.random.key(0))
    answers = np.zeros((16, 12), int), np.full(16, 12), np.ones(16, bool)
    first, again, other = (cutting._read(answers, np.arange(8), index) for index in (0, 0, 1))
    assert first == again != other and first[-1] is None
    lengths = [len(codec.tokenizer.encode(cut, add_special_tokens=False)) for cut in first[:-1]]
    assert all(text.startswith(cut) for cut in first[:-1]) and 1 <= min(lengths) < max(lengths) <= 5
    assert first[0:14:2] == first[1:14:2]
    # A process that holds the last activations cuts them where one that holds all does.
    rest = tuple(column[8:] for column in answers)
    assert cutting._read(rest, np.arange(4, 8), 0) == first[8:]
