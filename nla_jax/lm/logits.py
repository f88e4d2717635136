"""The LM head, applied only to the positions that are asked for and in chunks of tokens.

A float32 array of (batch, time, vocabulary) never exists: every function here walks over chunks of tokens and
recomputes a chunk's logits in the backward pass.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.lm.attention import matmul
from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import Params

CHUNK_TOKENS = 256
"""Tokens whose logits exist at one time."""


@flax.struct.dataclass
class TokenStatistics:
    """Per-token quantities of the next-token distribution, float32, in nats."""

    log_prob: Float[Array, "*B"]
    entropy: Float[Array, "*B"]


def logits(params: Params, config: LMConfig, final: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Unembed final-norm outputs: float32 logits for every row given."""
    kernel = params["lm_head"]["kernel"] if "lm_head" in params else params["embed"]["embedding"].T
    return matmul(final, kernel, config.compute_dtype)


def token_statistics(
    params: Params,
    config: LMConfig,
    final_BTD: Float[Array, "B T D"],
    targets_BT: Int[Array, "B T"],
    *,
    temperature: float | Float[Array, ""] = 1.0,
) -> TokenStatistics:
    """Log-probability of each target, and the entropy, under softmax(logits / temperature)."""

    def statistics(final_D: Array, targets: Array) -> TokenStatistics:
        log_probs = jax.nn.log_softmax(logits(params, config, final_D) / temperature)
        chosen = jnp.take_along_axis(log_probs, targets[:, None], axis=-1)[:, 0]
        return TokenStatistics(chosen, -jnp.sum(jnp.exp(log_probs) * log_probs, axis=-1))

    return _over_tokens(statistics, targets_BT.shape, final_BTD, targets_BT)


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

    def kl(final_D: Array, reference_D: Array) -> Array:
        log_p = jax.nn.log_softmax(logits(params, config, final_D) / temperature)
        log_q = jax.nn.log_softmax(logits(reference_params, config, reference_D) / temperature)
        return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)

    return _over_tokens(kl, final_BTD.shape[:2], final_BTD, reference_final_BTD)


def _over_tokens(function, shape, *arrays_BT):
    """Apply `function` to chunks of flattened tokens and give the results the leading `shape` back."""
    tokens = shape[0] * shape[1]
    chunk = min(CHUNK_TOKENS, tokens)
    padding = -tokens % chunk

    def chunks(array: Array) -> Array:
        flat = array.reshape(tokens, *array.shape[2:])
        return jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1)).reshape(-1, chunk, *flat.shape[1:])

    body = jax.checkpoint(lambda chunk: function(*chunk))
    result = jax.lax.map(body, tuple(chunks(array) for array in arrays_BT))
    return jax.tree.map(lambda x: x.reshape(-1)[:tokens].reshape(shape), result)
