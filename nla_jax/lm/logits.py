"""The LM head, applied only to the positions that are asked for and in chunks of tokens.

A float32 array of (batch, time, vocabulary) never exists: every function here walks over chunks of tokens and
recomputes a chunk's logits in the backward pass.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention import contract, matmul
from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import Params
from nla_jax.sharding.constraints import batch_shards, constrain_batch, gather_head, tensor_shards

CHUNK_LOGITS = 2**25
"""Most logits that exist on a device at one time: 128 MiB of float32."""


@flax.struct.dataclass
class TokenStatistics:
    """Per-token quantities of the next-token distribution, float32, in nats."""

    log_prob: Float[Array, "*B"]
    entropy: Float[Array, "*B"]


def head_kernel(params: Params) -> Float[Array, "D V"]:
    """The kernel of the LM head, which is the transposed embedding where the two are tied."""
    return params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T


def logits(params: Params, config: LMConfig, final: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Unembed final-norm outputs: float32 logits, soft-capped where the config says so, for every row given."""
    return _unembed(final, head_kernel(params), config.compute_dtype, config.logit_softcap)


def _unembed(final, head_DV, dtype, softcap):
    scores = matmul(final, head_DV, dtype)
    return scores if softcap is None else softcap * jnp.tanh(scores / softcap)


def token_statistics(
    params: Params,
    config: LMConfig,
    final_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> TokenStatistics:
    """Log-probability of each target, and the entropy, under softmax(logits / temperature).

    Only the log-probability is differentiable; the entropy is reported, not trained.
    """
    head = head_kernel(params)
    # Gathered once for all chunks; the gradient belongs to the head as it is stored.
    gathered = jax.lax.stop_gradient(gather_head(head, config.compute_dtype))

    def statistics(final_CD: Array, targets_C: Array) -> TokenStatistics:
        log_prob_C, entropy_C = _statistics(
            config.compute_dtype, config.logit_softcap, head, gathered, final_CD, targets_C, temperature
        )
        return TokenStatistics(log_prob_C, entropy_C)

    shards = tensor_shards()
    # `gather_head` splits the vocabulary in the same way.
    width = config.vocab_size if config.vocab_size % shards else config.vocab_size // shards
    return _over_tokens(statistics, width, targets_BT.shape, final_BTD, targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _statistics(dtype, softcap, head_DV, gathered_DV, final_CD, targets_C, temperature):
    return _statistics_forward(dtype, softcap, head_DV, gathered_DV, final_CD, targets_C, temperature)[0]


def _statistics_forward(dtype, softcap, head_DV, gathered_DV, final_CD, targets_C, temperature):
    """Log-probability and entropy of each token; `gathered_DV` is multiplied, `head_DV` receives the gradient."""
    logits_CV = _unembed(final_CD, gathered_DV, dtype, softcap) / temperature
    log_total_C = jax.nn.logsumexp(logits_CV, axis=-1)
    target_logit_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
    mean_logit_C = jnp.sum(jnp.exp(logits_CV - log_total_C[:, None]) * logits_CV, axis=-1)
    residuals = gathered_DV, final_CD, targets_C, temperature, log_total_C
    return (target_logit_C - log_total_C, log_total_C - mean_logit_C), residuals


def _statistics_backward(dtype, softcap, residuals, grads):
    head_DV, final_CD, targets_C, temperature, log_total_C = residuals
    # d log_prob / d logits = onehot − softmax, from logits recomputed here: nothing of size V was stored.
    logits_CV = _unembed(final_CD, head_DV, dtype, softcap)
    softmax_CV = jnp.exp(logits_CV / temperature - log_total_C[:, None])
    onehot_CV = jnp.arange(head_DV.shape[1]) == targets_C[:, None]
    grad_CV = (onehot_CV - softmax_CV) * (grads[0] / temperature)[:, None]
    if softcap is not None:
        # d (c tanh(s / c)) / ds = 1 − tanh²(s / c).
        grad_CV = grad_CV * (1 - (logits_CV / softcap) ** 2)
    grad_final_CD = contract("cv,dv->cd", grad_CV, head_DV, dtype)
    grad_head_DV = contract("cd,cv->dv", final_CD, grad_CV, dtype)
    return grad_head_DV, None, grad_final_CD, None, None


_statistics.defvjp(_statistics_forward, _statistics_backward)


def exact_kl(
    params: Params,
    reference_params: Params,
    config: LMConfig,
    final_BTD: Float[Array, "B T D"],
    reference_final_BTD: Float[Array, "B T D"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> Float[Array, "B T"]:
    """KL(policy || reference) per token over the whole vocabulary, in nats."""

    @jax.checkpoint
    def kl(final_D: Array, reference_D: Array) -> Array:
        log_p = jax.nn.log_softmax(logits(params, config, final_D) / temperature)
        log_q = jax.nn.log_softmax(logits(reference_params, config, reference_D) / temperature)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return _over_tokens(kl, config.vocab_size, final_BTD.shape[:2], final_BTD, reference_final_BTD)


def _over_tokens(function, width, shape, *arrays_BT):
    """Apply `function` to chunks of flattened tokens, and give its results the leading `shape` of `arrays_BT`.

    Every device that rows are split over computes its part of every chunk, `width` logits for each of its tokens.
    """
    ways = batch_shards(shape[0])
    tokens = shape[0] * shape[1] // ways
    # The fewest chunks that the limit allows, all of one size, so that there is little padding.
    chunk = -(-tokens // -(-tokens * width // CHUNK_LOGITS))
    padding = -tokens % chunk

    def chunks(array: Array) -> Array:
        rest = array.shape[2:]
        flat = jnp.pad(array.reshape(ways, tokens, *rest), [(0, 0), (0, padding)] + [(0, 0)] * len(rest))
        return flat.reshape(ways, -1, chunk, *rest).swapaxes(0, 1).reshape(-1, ways * chunk, *rest)

    def back(result: Array) -> Array:
        return result.reshape(-1, ways, chunk).swapaxes(0, 1).reshape(ways, -1)[:, :tokens].reshape(shape)

    result = jax.lax.map(lambda chunk: function(*map(constrain_batch, chunk)), tuple(map(chunks, arrays_BT)))
    return jax.tree.map(back, result)
