"""The activation reconstructor (AR): the target LM's first blocks and a linear head, reading text alone.

The AR keeps blocks 0..K of the target, drops the final norm and the LM head, and is read at the last token of its
prompt. The head starts as the identity and stays in float32. The template's prefix runs once per call.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder.metrics import direction_mse
from nla_jax.autoencoder.prompts import ReconstructorPrompt
from nla_jax.lm.attention import PAD_POSITION
from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import Params, Transformer, extend


@dataclasses.dataclass(frozen=True)
class Reconstructor:
    """The static description of an AR; hashable, so jit can specialize on it. Its weights come as `params`."""

    config: LMConfig
    """The truncated config: its last block is layer K."""
    prompt: ReconstructorPrompt
    remat: bool = False
    """See `Transformer.remat`."""

    @property
    def model(self) -> Transformer:
        """The transformer that reads whole prompts; apply it to `params["lm"]`."""
        return Transformer(self.config, self.remat)

    def init(self, lm_params: Params) -> Params:
        """AR parameters from the target LM's: {"lm": blocks 0..K, "head": identity}."""
        blocks = {f"blocks_{i}": lm_params[f"blocks_{i}"] for i in range(self.config.num_layers)}
        return {
            "lm": {"embed": lm_params["embed"], **blocks},
            "head": {"kernel": jnp.eye(self.config.d_model)},
        }

    def __call__(
        self, params: Params, prompts_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"]
    ) -> Float[Array, "B D"]:
        """Rebuild activations from encoded explanations (see `prompts.encode_reconstructor`).

        Only the direction is trained; the norm of a prediction means nothing.
        """
        model, last = self.model, self.config.num_layers - 1
        prefix, past = self.prompt.prefix, None
        if prefix:
            shared = model.apply({"params": params["lm"]}, jnp.array([prefix]), stop_after=last)
            past = extend(None, shared.segments)
        steps_T = jnp.arange(prompts_BT.shape[1])
        positions_BT = jnp.where(steps_T < lengths_B[:, None], len(prefix) + steps_T, PAD_POSITION)
        out = model.apply(
            {"params": params["lm"]}, prompts_BT, positions_BT, past=past, capture=(last,), stop_after=last
        )
        resid_BD = jnp.take_along_axis(out.resid[last], (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return resid_BD.astype(jnp.float32) @ params["head"]["kernel"]


def mse_loss(
    reconstructor: Reconstructor,
    params: Params,
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    activations_BD: Float[Array, "B D"],
) -> Float[Array, "B"]:
    """Direction MSE of each row, 2(1 - cos), in 0..4."""
    return direction_mse(reconstructor(params, prompts_BT, lengths_B), activations_BD)
