"""Kernels against the XLA implementation; splash attention runs in Pallas' interpreter here."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.attention import PAD_POSITION, KVSegment, attend
from nla_jax.lm.attention_kernels import check_implementation
from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import Transformer, init_params

CASES = {
    "grouped heads, padded rows": (2, 150, 4, 2, 64, {}),
    "one kv head, short text": (2, 20, 4, 1, 32, {}),
    "window inside a tile": (1, 140, 2, 2, 64, {"window": 5}),
    "window over tiles, scale": (1, 300, 2, 1, 128, {"window": 130, "scale": 0.3}),
    "window of one": (1, 130, 2, 2, 64, {"window": 1}),
    "soft cap": (2, 130, 2, 2, 64, {"softcap": 2.0}),
    "head dimension of Gemma": (1, 130, 2, 1, 256, {"scale": 168**-0.5}),
}


def arrays(B, T, H, K, Dh, seed=0):
    rng = np.random.default_rng(seed)
    query = 2 * rng.standard_normal((B, T, H, Dh)).astype(np.float32)
    keys, values = rng.standard_normal((2, B, K, T, Dh)).astype(np.float32)
    positions = np.tile(np.arange(T), (B, 1))
    positions[-1, 3 * T // 4 :] = PAD_POSITION
    return tuple(map(jnp.asarray, (query, keys, values, positions)))


def segment(keys, values, positions):
    return KVSegment(keys.transpose(1, 0, 3, 2), values.swapaxes(0, 1), positions)


def compare(implementation, shape, options, dtype, tolerance):
    """Values and gradients of a loss over rows that are not padding."""
    query, keys, values, positions = arrays(*shape)
    weight = jnp.asarray(np.random.default_rng(1).standard_normal(query.shape), jnp.float32)
    weight = jnp.where((positions == PAD_POSITION)[:, :, None, None], 0, weight)

    def loss(implementation, query, keys, values):
        own = segment(keys, values, positions)
        return (
            attend(query, positions, [own], dtype, implementation=implementation, **options) * weight
        ).sum()

    def both(implementation):
        gradient = jax.jit(jax.value_and_grad(lambda *x: loss(implementation, *x), argnums=(0, 1, 2)))
        return gradient(query, keys, values)

    (expected, expected_grads), (value, grads) = both("xla"), both(implementation)
    np.testing.assert_allclose(value, expected, rtol=tolerance, atol=10 * tolerance)
    for grad, reference in zip(grads, expected_grads, strict=True):
        assert np.linalg.norm(grad - reference) <= tolerance * (np.linalg.norm(reference) + 1)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="splash attention has no GPU kernel")
@pytest.mark.parametrize("case", CASES)
def test_splash_attention_equals_xla(case):
    *shape, options = CASES[case]
    compare("splash", shape, options, jnp.dtype("float32"), 1e-4)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="cuDNN needs a GPU")
@pytest.mark.parametrize("case", [case for case in CASES if case != "soft cap"])
def test_cudnn_attention_equals_xla(case):
    *shape, options = CASES[case]
    compare("cudnn", shape, options, jnp.dtype("bfloat16"), 2e-2)


@pytest.mark.parametrize("sliding", [False, True])
def test_a_forward_with_padding_uses_the_kernel_and_agrees(sliding):
    config = LMConfig("llama", 64, 32, 3, 4, 2, 8, 32, tie_embeddings=True)
    if sliding:
        config = dataclasses.replace(config, sliding_window=3, sliding_layers=(True, False, True))
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (2, 12), 0, 64)
    positions = jnp.where(jnp.arange(12) < jnp.array([[12], [7]]), jnp.arange(12), PAD_POSITION)

    def run(implementation):
        model = Transformer(dataclasses.replace(config, attention=implementation))
        return jax.jit(lambda p: model.apply({"params": p}, tokens, positions).final_BTD)

    assert "pallas_call" not in str(jax.make_jaxpr(run("xla"))(params))
    assert "pallas_call" in str(jax.make_jaxpr(run("splash"))(params))
    expected, found = run("xla")(params), run("splash")(params)
    real = np.asarray(positions) != PAD_POSITION
    np.testing.assert_allclose(found[real], expected[real], rtol=1e-4, atol=1e-5)
    assert np.isfinite(found).all()


def test_shared_segments_stay_on_xla():
    query, keys, values, positions = arrays(2, 6, 2, 2, 8)
    own = segment(keys, values, positions + 3)
    shared = segment(keys[:1, :, :3], values[:1, :, :3], jnp.arange(3)[None])

    def run(implementation):
        return attend(query, positions + 3, [shared, own], implementation=implementation)

    np.testing.assert_array_equal(run("splash"), run("xla"))


@pytest.mark.parametrize(
    ("implementation", "changes", "message"),
    [
        ("flash", {}, "attention='flash' is unknown; use one of xla, cudnn, splash"),
        ("cudnn", {"dtype": jnp.dtype("float32")}, "takes bfloat16 or float16 operands, not float32; set model."),
        ("cudnn", {"head_dim": 320}, "multiples of 8 up to 128, up to 256 from Hopper on, not 320; set model."),
        ("cudnn", {"head_dim": 36}, "multiples of 8 up to 128, up to 256 from Hopper on, not 36"),
        ("cudnn", {"softcap": 50.0}, "no soft cap of scores (this model's is 50.0); set model.attention to 'xla'"),
        ("cudnn", {"platform": "tpu"}, "runs on gpu, not on the tpu devices of this run; set model.attention"),
        ("splash", {"platform": "gpu"}, "attention='splash' runs on tpu or cpu, not on the gpu devices"),
    ],
)  # fmt: skip
def test_what_a_kernel_does_not_take_is_an_error(implementation, changes, message):
    fine = {"head_dim": 64, "dtype": jnp.dtype("bfloat16"), "softcap": None, "platform": "gpu"}
    with pytest.raises(ValueError) as error:
        check_implementation(implementation, **fine | changes)
    assert message in str(error.value)


def test_a_window_that_is_traced_is_an_error():
    query, keys, values, positions = arrays(1, 4, 2, 2, 8)

    def run(window):
        own = segment(keys, values, positions)
        return attend(query, positions, [own], window=window, implementation="splash")

    with pytest.raises(ValueError, match="windows that are known at compile time"):
        jax.jit(run)(jnp.int32(3))
