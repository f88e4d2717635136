"""The two supervised steps: AV fine-tuning on explanations, AR regression on activations.

Both are pure: (state, batch) -> (state, metrics). `jit_step` compiles them with the state donated. `base` holds the
frozen weights where the state's are adapters. `token_budget` is how many tokens a micro-batch has at most
(`packing.budget_for_lengths`), so that padding beyond it costs nothing; None computes all padding.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder.reconstructor import Reconstructor, mse_loss
from nla_jax.autoencoder.verbalizer import Verbalizer, sft_loss
from nla_jax.lm.lora import FrozenBase, with_adapters
from nla_jax.training.state import LossSums, TrainState, update

Given = jax.Array | np.ndarray
"""Arrays that a caller makes: compiled steps take NumPy's as well."""


@flax.struct.dataclass
class VerbalizerBatch:
    """Activations and the answers that explain them."""

    activations_BD: Float[Given, "B D"]
    responses_BT: Int[Given, "B T"]
    lengths_B: Int[Given, "B"]


@flax.struct.dataclass
class ReconstructorBatch:
    """Encoded explanations (without the shared prefix) and the activations to rebuild; weight 0 drops a row."""

    prompts_BT: Int[Given, "B T"]
    lengths_B: Int[Given, "B"]
    activations_BD: Float[Given, "B D"]
    weights_B: Float[Given, "B"]


def av_sft_step(
    state: TrainState,
    batch: VerbalizerBatch,
    base: FrozenBase | None = None,
    *,
    verbalizer: Verbalizer,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    token_budget: int | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One supervised AV update; the loss is the mean negative log-likelihood a token, in nats."""

    def sums(params: Any, piece: VerbalizerBatch) -> LossSums:
        loss, _ = sft_loss(
            verbalizer,
            with_adapters(base, params),
            piece.activations_BD,
            piece.responses_BT,
            piece.lengths_B,
            token_budget,
        )
        return LossSums(loss)

    return update(state, optimizer, sums, batch, batch.lengths_B.sum().astype("float32"), micro_batches)


def ar_mse_step(
    state: TrainState,
    batch: ReconstructorBatch,
    base: FrozenBase | None = None,
    *,
    reconstructor: Reconstructor,
    optimizer: optax.GradientTransformation,
    micro_batches: int = 1,
    token_budget: int | None = None,
) -> tuple[TrainState, dict[str, Array]]:
    """One AR regression update; the loss is the mean direction MSE over rows with weight.

    The metrics hold `mse_nrm_B`, each row's direction MSE before the update: in joint training it is the reward,
    so scoring and updating share one forward.
    """

    def sums(params: Any, piece: ReconstructorBatch) -> LossSums:
        mse_B = mse_loss(
            reconstructor,
            with_adapters(base, params),
            piece.prompts_BT,
            piece.lengths_B,
            piece.activations_BD,
            token_budget,
        )
        return LossSums((mse_B * piece.weights_B).sum(), per_row={"mse_nrm_B": mse_B})

    return update(state, optimizer, sums, batch, batch.weights_B.sum(), micro_batches)


def jit_step(step: Callable, **static: Any) -> Callable:
    """Compile a step with its static arguments bound.

    Args:
      step: a pure step such as `av_sft_step`, `ar_mse_step` or `grpo.grpo_step`, whose first argument is its state.
      static: the step's arguments that no call changes: its model, optimizer and config.

    Returns:
      The jitted step, which takes the other arguments by position or by name, as the step itself does. It donates the
      state, and compiles anew for every `token_budget`.
    """

    @functools.wraps(step)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return step(*args, **kwargs, **static)

    return jax.jit(bound, donate_argnums=0, static_argnames="token_budget")
