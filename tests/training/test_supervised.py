import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.autoencoder.prompts import (
    PromptTemplates,
    build_reconstructor_prompt,
    build_verbalizer_prompt,
    encode_reconstructor,
    encode_responses,
)
from nla_jax.autoencoder.reconstructor import Reconstructor, mse_loss
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer, sft_loss
from nla_jax.lm.packing import budget_for_lengths
from nla_jax.training.state import OptimizerConfig, TrainState
from nla_jax.training.supervised import (
    ReconstructorBatch,
    VerbalizerBatch,
    ar_mse_step,
    av_sft_step,
    jit_step,
)

TEMPLATES = PromptTemplates(verbalizer="Vector: {injection_char}")
TEXTS = ["a list of functions", "x", "how to parse a string", "an argument"]
ACTIVATIONS = jnp.asarray(np.random.default_rng(0).standard_normal((4, 32)), jnp.float32)
OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=0).build()
compiled = functools.cache(jit_step)


@pytest.fixture(scope="module")
def av(tiny_lm):
    """Verbalizer over the tiny model's first block, its parameters and a batch."""
    config = dataclasses.replace(tiny_lm.config, num_layers=1)
    params = {name: tiny_lm.params[name] for name in ("embed", "blocks_0", "final_norm")}
    prompt = build_verbalizer_prompt(tiny_lm.tokenizer, TEMPLATES)
    verbalizer = Verbalizer(config, prompt, InjectionConfig(), scale=3.0)
    ids, lengths = encode_responses(tiny_lm.tokenizer, prompt, TEXTS, 20)
    batch = VerbalizerBatch(ACTIVATIONS, jnp.asarray(ids), jnp.asarray(lengths))
    return verbalizer, verbalizer.init(params), batch


@pytest.fixture(scope="module")
def ar(tiny_lm):
    """Reconstructor of layer 0, its parameters and a batch whose third row has no weight."""
    prompt = build_reconstructor_prompt(tiny_lm.tokenizer, TEMPLATES)
    reconstructor = Reconstructor(tiny_lm.config.truncated(0), prompt)
    ids, lengths = encode_reconstructor(tiny_lm.tokenizer, prompt, TEXTS, 32)
    weights = jnp.array([1.0, 1.0, 0.0, 1.0])
    batch = ReconstructorBatch(jnp.asarray(ids), jnp.asarray(lengths), ACTIVATIONS, weights)
    return reconstructor, reconstructor.init(tiny_lm.params), batch


def av_run(av, batch=None, token_budget=None, **options):
    verbalizer, params, own = av
    step = compiled(av_sft_step, verbalizer=verbalizer, optimizer=OPTIMIZER, **options)
    return step(TrainState.create(params, OPTIMIZER), batch or own, token_budget=token_budget)


def ar_run(ar, batch=None, token_budget=None, **options):
    reconstructor, params, own = ar
    step = compiled(ar_mse_step, reconstructor=reconstructor, optimizer=OPTIMIZER, **options)
    return step(TrainState.create(params, OPTIMIZER), batch or own, token_budget=token_budget)


def assert_same_update(left, right):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)

    jax.tree.map(close, left[1], right[1])
    # Adam's moments are linear and quadratic in the gradient; its first update alone would only show signs.
    jax.tree.map(close, left[0].opt_state, right[0].opt_state)


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_nothing_in_the_av(av, micro_batches):
    assert_same_update(av_run(av, micro_batches=micro_batches), av_run(av))


@pytest.mark.parametrize("micro_batches", [2, 4])
def test_micro_batches_change_nothing_in_the_ar(ar, micro_batches):
    assert_same_update(ar_run(ar, micro_batches=micro_batches), ar_run(ar))


@pytest.mark.parametrize(("run", "model"), [(av_run, "av"), (ar_run, "ar")])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_padding_left_out_changes_nothing(run, model, micro_batches, request):
    model = request.getfixturevalue(model)
    tokens_BT = jax.tree.leaves(model[2])[1 if run is av_run else 0]
    lengths_B = np.asarray(model[2].lengths_B)
    token_budget = budget_for_lengths(lengths_B, tokens_BT.shape[1], micro_batches=micro_batches, buckets=16)
    assert token_budget is not None
    assert_same_update(run(model, token_budget=token_budget, micro_batches=micro_batches), run(model))


def test_av_loss_is_the_mean_over_tokens_of_unlike_rows(av):
    verbalizer, params, batch = av
    arrays = batch.activations_BD, batch.responses_BT, batch.lengths_B
    total, tokens = jax.jit(lambda p: sft_loss(verbalizer, p, *arrays))(params)
    metrics = av_run(av)[1]
    np.testing.assert_allclose(metrics["loss"], total / tokens, rtol=1e-5)
    assert tokens == batch.lengths_B.sum() and len(set(batch.lengths_B.tolist())) > 1


def test_ar_reports_every_row_in_order_and_drops_rows_without_weight(ar):
    reconstructor, params, batch = ar
    arrays = batch.prompts_BT, batch.lengths_B, batch.activations_BD
    expected = jax.jit(lambda p: mse_loss(reconstructor, p, *arrays))(params)
    for micro_batches in (1, 2):
        metrics = ar_run(ar, micro_batches=micro_batches)[1]
        np.testing.assert_allclose(metrics["mse_nrm_B"], expected, rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], expected[jnp.array([0, 1, 3])].mean(), rtol=1e-5)


def test_a_row_without_weight_does_not_enter_the_update(ar):
    other = ar[2].replace(activations_BD=ACTIVATIONS.at[2].set(-5.0))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8),
        ar_run(ar, other)[0].opt_state,
        ar_run(ar)[0].opt_state,
    )


@pytest.mark.parametrize(("run", "model"), [(av_run, "av"), (ar_run, "ar")])
def test_steps_are_deterministic(run, model, request):
    left, right = (run(request.getfixturevalue(model)) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, left, right)


@pytest.mark.parametrize(("step", "model"), [(av_sft_step, "av"), (ar_mse_step, "ar")])
def test_loss_falls(step, model, request):
    static, params, batch = request.getfixturevalue(model)
    named = {"av": "verbalizer", "ar": "reconstructor"}[model]
    run = compiled(step, optimizer=OPTIMIZER, **{named: static})
    state, losses = TrainState.create(params, OPTIMIZER), []
    for _ in range(8):
        state, metrics = run(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
    assert state.step == 8


def test_jit_step_donates_the_state_alone(ar):
    reconstructor, params, batch = ar
    state = TrainState.create(params, OPTIMIZER)
    compiled(ar_mse_step, reconstructor=reconstructor, optimizer=OPTIMIZER)(state, batch)
    assert state.params["head"]["kernel"].is_deleted()
    assert not batch.prompts_BT.is_deleted() and not params["head"]["kernel"].is_deleted()
