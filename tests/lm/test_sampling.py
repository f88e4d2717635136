import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from nla_jax.lm.sampling import for_decoding, in_compute_dtype, sample, sample_token
from nla_jax.lm.transformer import Transformer, extend, stack_blocks

DRAWS = 20_000
MAX_TOKENS, GROUP, NEVER = 24, 3, 9999
TEMPERATURE = 6.0
"""Hot enough for the tiny model's rows to differ."""
PROMPTS = jnp.asarray(np.random.default_rng(0).integers(4, 500, (2, 5)))


def draw(logits_V, temperature=1.0, draws=DRAWS, seed=0):
    logits_BV = jnp.broadcast_to(jnp.asarray(logits_V, jnp.float32), (draws, len(logits_V)))
    return jax.jit(sample_token)(jax.random.key(seed), logits_BV, jnp.float32(temperature))


@pytest.mark.parametrize("vocabulary", [7, 256, 300, 1000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_match_softmax(vocabulary, temperature):
    logits = np.random.default_rng(vocabulary).standard_normal(vocabulary)
    ids, log_probs = draw(logits, temperature)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    counts = np.bincount(ids, minlength=vocabulary)
    # Rare tokens share a cell, as the chi-square distribution asks for.
    rare = expected * DRAWS < 5
    cells = [np.append(x[~rare], x[rare].sum()) for x in (counts, expected * DRAWS)]
    keep = cells[1] > 0
    assert stats.chisquare(cells[0][keep], cells[1][keep]).pvalue > 1e-3
    np.testing.assert_allclose(log_probs, np.log(expected)[ids], atol=1e-4)


@pytest.mark.parametrize(
    ("logits", "possible"),
    [
        ({0: 1e4}, {0}),
        ({299: 1e4}, {299}),
        ({3: -1e30, 5: 1e30}, {5}),
        ({0: 500.0, 299: 500.0}, {0, 299}),
        ({255: 500.0, 256: 500.0}, {255, 256}),
    ],
)
def test_extreme_logits_draw_only_tokens_with_weight(logits, possible):
    row = np.zeros(300)
    row[list(logits)] = list(logits.values())
    ids, log_probs = draw(row)
    assert set(np.unique(ids).tolist()) == possible
    np.testing.assert_allclose(log_probs, -np.log(len(possible)), atol=1e-5)


def test_minus_infinity_is_never_drawn():
    row = np.full(600, -np.inf)
    row[[2, 511, 599]] = [1.0, 2.0, 3.0]
    ids, log_probs = draw(row)
    assert set(np.unique(ids).tolist()) == {2, 511, 599}
    assert np.isfinite(log_probs).all()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-24])
def test_both_ends_of_the_uniform_number_are_tokens_with_weight(uniform):
    logits = np.random.default_rng(1).standard_normal((50, 300)).astype(np.float32)
    logits[:, :3] = logits[:, 290:] = -200
    with mock.patch.object(jax.random, "uniform", return_value=jnp.full(50, uniform)):
        ids, log_probs = sample_token(jax.random.key(0), jnp.asarray(logits), jnp.float32(1.0))
    assert (ids >= 3).all() and (ids < 290).all() and (log_probs > -20).all()


def test_greedy_takes_the_most_likely_and_reports_its_probability():
    logits = np.random.default_rng(2).standard_normal((40, 300)).astype(np.float32)
    ids, log_probs = sample_token(jax.random.key(0), jnp.asarray(logits), jnp.float32(0.0))
    np.testing.assert_array_equal(ids, logits.argmax(-1))
    np.testing.assert_allclose(log_probs, jax.nn.log_softmax(logits).max(-1), atol=1e-5)


@pytest.fixture(scope="module")
def prompt(tiny_lm):
    """Weights for decoding, and what `sample` needs of the two prompts."""
    out = Transformer(tiny_lm.config).apply({"params": tiny_lm.params}, PROMPTS)
    params = for_decoding(tiny_lm.params, tiny_lm.config)
    return params, extend(None, out.segments), out.final_BTD[:, -1]


@pytest.fixture(scope="module")
def run(tiny_lm, prompt):
    """Sample from the two prompts; only the static arguments recompile."""

    @functools.partial(jax.jit, static_argnames=("max_tokens", "closing", "end_token"))
    def compiled(params, past, final, key, temperature, **static):
        return sample(
            params, tiny_lm.config, past, final, 5, key, group=GROUP, temperature=temperature, **static
        )

    def call(*, closing=(NEVER,), end_token=NEVER, max_tokens=MAX_TOKENS, temperature=TEMPERATURE, seed=0):
        static = {"max_tokens": max_tokens, "closing": closing, "end_token": end_token}
        return compiled(*prompt, jax.random.key(seed), temperature, **static)

    return call


@pytest.fixture(scope="module")
def endless(run):
    """Rows that nothing ends before `max_tokens`."""
    return run()


def cut(endless, closing, end_token, max_tokens=MAX_TOKENS):
    """What ending the endless rows by the rules gives, worked out on the finished tokens."""
    tokens, log_probs = (np.array(x[:, :max_tokens]) for x in (endless.tokens_BT, endless.log_probs_BT))
    lengths, closed = np.full(len(tokens), max_tokens), np.zeros(len(tokens), bool)
    for b, row in enumerate(tokens):
        for t in range(max_tokens):
            closed[b] = t + 1 >= len(closing) and tuple(row[t + 1 - len(closing) : t + 1]) == closing
            if closed[b] or row[t] == end_token:
                lengths[b] = t + 1
                break
        tokens[b, lengths[b] :] = log_probs[b, lengths[b] :] = 0
    return tokens, log_probs, lengths, closed


def assert_samples(samples, expected):
    tokens, log_probs, lengths, closed = expected
    np.testing.assert_array_equal(samples.tokens_BT, tokens)
    np.testing.assert_array_equal(samples.lengths_B, lengths)
    np.testing.assert_array_equal(samples.closed_B, closed)
    np.testing.assert_allclose(samples.log_probs_BT, log_probs, atol=1e-5)


def test_endless_rows_are_cut_at_max_tokens_unclosed(endless, run):
    assert (endless.lengths_B == MAX_TOKENS).all() and not endless.closed_B.any()
    assert len(np.unique(endless.tokens_BT, axis=0)) == 2 * GROUP
    assert_samples(run(max_tokens=7), cut(endless, (NEVER,), NEVER, max_tokens=7))


@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("start", [0, 4, MAX_TOKENS - 3])
def test_a_row_ends_with_its_closing_sequence(endless, run, length, start):
    closing = tuple(int(i) for i in endless.tokens_BT[2, start : start + length])
    expected = cut(endless, closing, NEVER)
    assert expected[3][2] and not expected[3].all()
    assert_samples(run(closing=closing), expected)


def test_an_end_token_ends_a_row_unclosed(endless, run):
    end = int(endless.tokens_BT[1, 6])
    closing = tuple(int(i) for i in endless.tokens_BT[4, 2:5])
    expected = cut(endless, closing, end)
    assert expected[2][1] <= 7 and not expected[3][1] and expected[3][4]
    assert_samples(run(closing=closing, end_token=end), expected)


def test_an_end_token_that_completes_the_closing_closes_the_row(endless, run):
    closing = tuple(int(i) for i in endless.tokens_BT[3, 2:5])
    samples = run(closing=closing, end_token=closing[-1])
    assert_samples(samples, cut(endless, closing, closing[-1]))
    assert samples.closed_B[3]


def test_the_loop_ends_when_every_row_has_ended(tiny_lm, prompt, endless):
    steps, real = [], jax.lax.while_loop

    def counted(condition, body, start):
        result = real(condition, body, start)
        steps.append(int(result[0]))
        return result

    # One row alone: the first prompt's first, under its own random numbers.
    params, past, final = prompt
    past = jax.tree.map(lambda x: x[:, :1] if x.ndim == 4 else x[:1], past)
    settings = {"group": 1, "max_tokens": MAX_TOKENS, "end_token": NEVER, "temperature": 0.0}
    with mock.patch.object(jax.lax, "while_loop", counted):
        arguments = (params, tiny_lm.config, past, final[:1], 5, jax.random.key(0))
        full = sample(*arguments, closing=(NEVER,), **settings)
        closing = (int(full.tokens_BT[0, 2]),)
        short = sample(*arguments, closing=closing, **settings)
    assert steps == [MAX_TOKENS, short.lengths_B[0]]
    assert_samples(short, cut(full, closing, NEVER))


def test_log_probs_are_those_of_the_plain_forward(tiny_lm, endless):
    """Every sampled token's log-probability, from one forward over prompt and answer."""
    rows = jnp.concatenate([jnp.repeat(PROMPTS, GROUP, axis=0), jnp.asarray(endless.tokens_BT)], axis=1)
    out = Transformer(tiny_lm.config).apply({"params": tiny_lm.params}, rows)
    log_probs = jax.nn.log_softmax(out.final_BTD @ tiny_lm.params["embed"]["embedding"].T / TEMPERATURE)[
        :, 4:-1
    ]
    expected = np.take_along_axis(log_probs, endless.tokens_BT[..., None], axis=2)[..., 0]
    np.testing.assert_allclose(endless.log_probs_BT, expected, atol=1e-4)


def test_greedy_rows_follow_the_argmax_of_the_plain_forward(tiny_lm, run):
    samples = run(temperature=0.0)
    rows = jnp.concatenate([jnp.repeat(PROMPTS, GROUP, axis=0), jnp.asarray(samples.tokens_BT)], axis=1)
    out = Transformer(tiny_lm.config).apply({"params": tiny_lm.params}, rows)
    logits = out.final_BTD @ tiny_lm.params["embed"]["embedding"].T
    np.testing.assert_array_equal(samples.tokens_BT, logits[:, 4:-1].argmax(-1))
    np.testing.assert_array_equal(samples.tokens_BT[0], samples.tokens_BT[1])


def test_the_same_key_gives_the_same_samples(endless, run):
    np.testing.assert_array_equal(run().tokens_BT, endless.tokens_BT)
    assert (run(seed=1).tokens_BT != endless.tokens_BT).any()


def test_for_decoding_casts_kernels_and_keeps_what_they_compute(tiny_lm):
    config = dataclasses.replace(tiny_lm.config, dtype="bfloat16")
    cast = for_decoding(tiny_lm.params, config)
    assert cast["blocks_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert cast["blocks_0"]["mlp_norm"]["scale"].dtype == jnp.float32
    kept = for_decoding(tiny_lm.params, tiny_lm.config)
    np.testing.assert_array_equal(kept["lm_head"]["kernel"], tiny_lm.params["embed"]["embedding"].T)
    a, b = (Transformer(config).apply({"params": p}, PROMPTS).final_BTD for p in (cast, tiny_lm.params))
    np.testing.assert_array_equal(a, b)


def test_stacked_blocks_stay_stacked_in_compute_dtype(tiny_lm):
    config = dataclasses.replace(tiny_lm.config, dtype="bfloat16")
    stacked = stack_blocks(tiny_lm.params)
    cast = in_compute_dtype(stacked, config)
    block = cast["blocks"]
    assert block["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert block["mlp_norm"]["scale"].dtype == cast["embed"]["embedding"].dtype == jnp.float32
    np.testing.assert_array_equal(
        cast["lm_head"]["kernel"], tiny_lm.params["embed"]["embedding"].T.astype(jnp.bfloat16)
    )
    a, b = (Transformer(config).apply({"params": p}, PROMPTS).final_BTD for p in (cast, stacked))
    np.testing.assert_array_equal(a, b)


def test_stacked_blocks_sample_what_unstacked_ones_do(tiny_lm, endless):
    params = in_compute_dtype(stack_blocks(tiny_lm.params), tiny_lm.config)
    out = Transformer(tiny_lm.config).apply({"params": params}, PROMPTS)
    settings = {"group": GROUP, "max_tokens": MAX_TOKENS, "closing": (NEVER,), "end_token": NEVER}
    run = jax.jit(functools.partial(sample, config=tiny_lm.config, first_position=5, **settings))
    past = extend(None, out.segments)
    samples = run(
        params, past=past, final_ND=out.final_BTD[:, -1], key=jax.random.key(0), temperature=TEMPERATURE
    )
    np.testing.assert_array_equal(samples.tokens_BT, endless.tokens_BT)
    np.testing.assert_allclose(samples.log_probs_BT, endless.log_probs_BT, atol=1e-5)


def test_decode_buffers_are_updated_in_place(tiny_lm, prompt):
    config, max_tokens = tiny_lm.config, 2048
    settings = {"group": GROUP, "max_tokens": max_tokens, "closing": (NEVER,), "end_token": NEVER}

    def read_and_sample(params, key):
        out = Transformer(config).apply({"params": params}, PROMPTS)
        past = extend(None, out.segments)
        return sample(params, config, past, out.final_BTD[:, -1], PROMPTS.shape[1], key, **settings)

    compiled = jax.jit(read_and_sample).lower(prompt[0], jax.random.key(0)).compile()
    rows = len(PROMPTS) * GROUP
    cache = config.num_layers * 2 * rows * config.num_kv_heads * max_tokens * config.head_dim * 4
    # One block's scores and weights come on top; a second copy of the buffers would be twice the cache.
    assert cache < compiled.memory_analysis().temp_size_in_bytes < 1.5 * cache
