import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nla_jax.lm.attention import PAD_POSITION, KVSegment, attend, contract, matmul

B, N, T, H, K, DH = 6, 2, 3, 4, 2, 8


def dense_attention(query, positions, segments, xp=np, window=2**31, softcap=None):
    """One row and head at a time, every key and value copied to its row: what attend() must equal."""
    rows = []
    for b in range(query.shape[0]):
        own = [b // (query.shape[0] // len(p)) for _, _, p in segments]
        key_positions = np.concatenate([p[r] for r, (_, _, p) in zip(own, segments, strict=True)])
        heads = []
        for h in range(query.shape[2]):
            kv = h // (query.shape[2] // len(segments[0][0]))
            keys = xp.concatenate([k[kv, r] for r, (k, _, _) in zip(own, segments, strict=True)])
            values = xp.concatenate([v[kv, r] for r, (_, v, _) in zip(own, segments, strict=True)])
            scores = query[b, :, h] @ keys.T / np.sqrt(query.shape[-1])
            if softcap:
                scores = softcap * xp.tanh(scores / softcap)
            distance = positions[b][:, None] - key_positions[None]
            scores = xp.where((distance >= 0) & (distance < window), scores, -1e9)
            weights = xp.exp(scores - scores.max(-1, keepdims=True))
            heads.append(weights @ values / weights.sum(-1, keepdims=True))
        rows.append(xp.stack(heads, axis=1))
    return xp.stack(rows)


@pytest.fixture(scope="module")
def case():
    """Queries, and segments with 1, N and B rows; unused slots in the last two and one padding query."""
    rng = np.random.default_rng(0)

    def segment(rows, length):
        keys, values = rng.standard_normal((2, K, rows, length, DH)).astype(np.float32)
        return keys, values

    query = 2 * rng.standard_normal((B, T, H, DH)).astype(np.float32)
    positions = np.tile(np.arange(9, 12), (B, 1))
    positions[4, 2] = PAD_POSITION
    shared = np.arange(5)[None]
    group = np.tile(np.arange(5, 9), (N, 1))
    group[1, 2:] = PAD_POSITION
    segments = [(*segment(1, 5), shared), (*segment(N, 4), group), (*segment(B, T), positions)]
    return query, positions, segments


def run(query, positions, segments, dtype="float32", **options):
    pieces = [
        KVSegment(jnp.asarray(k).swapaxes(2, 3), jnp.asarray(v), jnp.asarray(p)) for k, v, p in segments
    ]
    return attend(jnp.asarray(query), jnp.asarray(positions), pieces, jnp.dtype(dtype), **options)


def test_shared_segments_equal_dense_attention(case):
    query, positions, segments = case
    wide = [(k.astype(np.float64), v.astype(np.float64), p) for k, v, p in segments]
    expected = dense_attention(query.astype(np.float64), positions, wide)
    np.testing.assert_allclose(run(*case), expected, atol=1e-5)


# 1: a query's own token alone; 3: queries 9 to 11 see parts of each other and of the middle segment; 8: a part
# of the shared one as well.
@pytest.mark.parametrize(
    "options", [{"window": 1}, {"window": 3}, {"window": 8, "softcap": 0.7}, {"softcap": 2.0}]
)
def test_windows_and_soft_caps_equal_dense_attention(case, options):
    query, positions, segments = case
    wide = [(k.astype(np.float64), v.astype(np.float64), p) for k, v, p in segments]
    expected = dense_attention(query.astype(np.float64), positions, wide, **options)
    np.testing.assert_allclose(run(*case, **options), expected, atol=1e-5)


def test_scale_replaces_the_square_root_of_the_head_size(case):
    query, positions, segments = case
    scaled = run(query * np.float32(0.3 * np.sqrt(DH)), positions, segments)
    np.testing.assert_allclose(run(*case, scale=0.3), scaled, atol=1e-5)


@pytest.mark.parametrize("order", [(2, 1, 0), (1, 2, 0)])
def test_order_of_segments_does_not_matter(case, order):
    query, positions, segments = case
    out = run(query, positions, [segments[i] for i in order])
    np.testing.assert_allclose(out, run(*case), atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"window": 8, "softcap": 0.7}])
def test_gradients_equal_dense_attention(case, options):
    query, positions, segments = case
    probe = np.random.default_rng(1).standard_normal(query.shape).astype(np.float32)

    def loss(attention):
        def value(query, keys_values):
            pieces = [(k, v, p) for (k, v), (_, _, p) in zip(keys_values, segments, strict=True)]
            return jnp.sum(attention(query, pieces) * probe)

        return jax.jit(jax.grad(value, argnums=(0, 1)))

    keys_values = [(k, v) for k, v, _ in segments]
    actual = loss(lambda q, s: run(q, positions, s, **options))(query, keys_values)
    expected = loss(lambda q, s: dense_attention(q, positions, s, jnp, **options))(query, keys_values)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), actual, expected)


def test_bfloat16_operands_stay_close_and_give_float32(case):
    # One row and one kv head: XLA:CPU multiplies bfloat16 matrices, but not batches of them.
    query, positions, (shared, *_) = case
    keys, values, key_positions = shared
    one = [(keys[:1], values[:1], key_positions)]
    rounded, exact = (
        jax.jit(lambda q, d=d: run(q, positions, one, d))(query) for d in ("bfloat16", "float32")
    )
    assert rounded.dtype == jnp.float32
    error = np.linalg.norm(rounded - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 2e-2


def test_unused_slots_are_invisible(case):
    query, positions, segments = case

    def loud(x, p):
        return np.where((p == PAD_POSITION)[:, :, None], np.float32(1e4), x)

    changed = [(loud(k, p), loud(v, p), p) for k, v, p in segments]
    used = positions != PAD_POSITION
    np.testing.assert_array_equal(run(query, positions, changed)[used], run(*case)[used])


def test_extreme_scores_do_not_overflow(case):
    query, positions, segments = case
    expected = dense_attention(1e4 * query.astype(np.float64), positions, segments)
    np.testing.assert_allclose(run(np.float32(1e4) * query, positions, segments), expected, atol=1e-4)


def test_query_that_sees_no_key_is_zero_with_finite_gradients(case):
    query, positions, segments = case
    blind = positions.copy()
    blind[1] = -1
    np.testing.assert_array_equal(run(query, blind, segments)[1], 0)

    def total(query, keys_values):
        pieces = [(k, v, p) for (k, v), (_, _, p) in zip(keys_values, segments, strict=True)]
        return run(query, blind, pieces).sum()

    grads = jax.grad(total, argnums=(0, 1))(query, [(k, v) for k, v, _ in segments])
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_contract_rounds_operands_and_keeps_float32(dtype):
    rng = np.random.default_rng(2)
    a, b = (jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((4, 6), (6, 5)))
    rounded = [np.asarray(x.astype(dtype), np.float64) for x in (a, b)]
    probe = jnp.asarray(rng.standard_normal((4, 5))).astype(dtype).astype(jnp.float32)
    out, pull = jax.vjp(lambda a, b: contract("mi,io->mo", a, b, jnp.dtype(dtype)), a, b)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, rounded[0] @ rounded[1], rtol=1e-5, atol=1e-5)
    grad_a, grad_b = pull(probe)
    np.testing.assert_allclose(grad_a, probe @ rounded[1].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_b, rounded[0].T @ probe, rtol=1e-5, atol=1e-5)


def test_a_transposed_weight_gradient_in_bfloat16_equals_the_plain_one():
    a, b = (jnp.asarray(np.random.default_rng(5).standard_normal((7, n)), jnp.bfloat16) for n in (4, 6))
    out = jax.jit(lambda a, b: contract("mi,mo->io", a, b, jnp.dtype("bfloat16")).T)(a, b)
    np.testing.assert_allclose(out, b.astype(jnp.float32).T @ a.astype(jnp.float32), rtol=1e-5, atol=1e-5)


def test_contract_gives_each_operand_a_gradient_of_its_own_dtype():
    a, b = jnp.ones((2, 3), jnp.bfloat16), jnp.ones((3, 2), jnp.float32)
    grads = jax.grad(lambda a, b: contract("mi,io->mo", a, b, jnp.dtype("bfloat16")).sum(), (0, 1))(a, b)
    assert [grad.dtype for grad in grads] == [jnp.bfloat16, jnp.float32]


def test_matmul_keeps_leading_axes():
    x = np.random.default_rng(3).standard_normal((2, 3, 4)).astype(np.float32)
    kernel = np.random.default_rng(4).standard_normal((4, 5)).astype(np.float32)
    np.testing.assert_allclose(
        matmul(jnp.asarray(x), jnp.asarray(kernel), jnp.dtype("float32")), x @ kernel, rtol=1e-5, atol=1e-6
    )
