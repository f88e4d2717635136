"""Teaching answers to questions about activations: the AV's supervised step with a question before each answer.

The question is part of what follows the prompt, so that all questions share one program; the loss is over the answer's
tokens alone.
"""

from typing import Any

import flax.struct
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder.verbalizer import Verbalizer, token_mask
from nla_jax.lm.lora import FrozenBase, with_adapters
from nla_jax.training.state import LossSums, TrainState, update
from nla_jax.training.supervised import Given, VerbalizerBatch


@flax.struct.dataclass
class AnswerBatch(VerbalizerBatch):
    """Activations, and a question with its answer about each of them, whose first tokens are the question's."""

    question_lengths_B: Int[Given, "B"]


def answer_log_probs(
    verbalizer: Verbalizer, params: Any, batch: AnswerBatch, token_budget: int | None = None
) -> Float[Array, "B"]:
    """The log-probability (nats) of each answer, closing included, after its activation and question."""
    statistics = verbalizer.statistics(
        params, batch.activations_BD, batch.responses_BT, batch.lengths_B, token_budget=token_budget
    )
    T = batch.responses_BT.shape[1]
    mask_BT = token_mask(batch.lengths_B, T) - token_mask(batch.question_lengths_B, T)
    return jnp.sum(jnp.where(mask_BT > 0, statistics.log_prob, 0), axis=1)


def answer_step(
    state: TrainState,
    batch: AnswerBatch,
    base: FrozenBase | None = None,
    *,
    verbalizer: Verbalizer,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    token_budget: int | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One supervised update; the loss is the mean negative log-likelihood of a token of the answers, in nats."""

    def sums(params: Any, piece: AnswerBatch) -> LossSums:
        log_prob_B = answer_log_probs(verbalizer, with_adapters(base, params), piece, token_budget)
        return LossSums(-log_prob_B.sum())

    answered = (batch.lengths_B - batch.question_lengths_B).sum().astype("float32")
    return update(state, optimizer, sums, batch, answered, micro_batches)
