"""The activation reconstructor (AR): the target LM's first blocks and a linear head, reading text alone.

The AR keeps blocks 0..K of the target, drops the final norm and the LM head, and is read at the last token of its
prompt. The head starts as the identity and stays in float32. The template's prefix runs once per call.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder.metrics import direction_mse
from nla_jax.autoencoder.prompts import ReconstructorPrompt
from nla_jax.lm.attention import PAD_POSITION
from nla_jax.lm.config import LMConfig
from nla_jax.lm.flops import forward_flops
from nla_jax.lm.transformer import Params, Transformer


@dataclasses.dataclass(frozen=True)
class Reconstructor:
    """The static description of an AR; hashable, so jit can specialize on it. Its weights come as `params`."""

    config: LMConfig
    """The truncated config: its last block is layer K."""
    prompt: ReconstructorPrompt
    remat: bool = False
    pack: bool = True
    """See `Transformer` for both."""

    @property
    def model(self) -> Transformer:
        """The transformer that reads whole prompts; apply it to `params["lm"]`."""
        return Transformer(self.config, self.remat, self.pack)

    def init(self, lm_params: Params) -> Params:
        """AR parameters from the target LM's, stacked or not: {"lm": blocks 0..K, "head": identity}."""
        count = self.config.num_layers
        kept = ("embed", "position_embed", *(f"blocks_{i}" for i in range(count)))
        lm = {name: lm_params[name] for name in kept if name in lm_params}
        if "blocks" in lm_params:
            lm["blocks"] = jax.tree.map(lambda x: x[:count], lm_params["blocks"])
        return {"lm": lm, "head": {"kernel": jnp.eye(self.config.d_model)}}

    def __call__(
        self,
        params: Params,
        prompts_BT: Int[Array, "B T"],
        lengths_B: Int[Array, "B"],
        token_budget: int | None = None,
    ) -> Float[Array, "B D"]:
        """Rebuild activations from encoded explanations (see `prompts.encode_reconstructor`).

        Only the direction is trained; the norm of a prediction means nothing.

        Args:
          params: the AR's.
          prompts_BT: without the shared prefix.
          lengths_B: their tokens.
          token_budget: the number of all prompts' tokens, at most (see `packing.budget_for_lengths`); padding beyond
            it is left out.
        """
        prefix, last = self.prompt.prefix, self.config.num_layers - 1
        steps_T = jnp.arange(prompts_BT.shape[1])
        positions_BT = jnp.where(steps_T < lengths_B[:, None], len(prefix) + steps_T, PAD_POSITION)
        pieces, positions = (prompts_BT,), (positions_BT,)
        if prefix:
            pieces, positions = (jnp.array([prefix]), *pieces), (jnp.arange(len(prefix))[None], *positions)
        out = self.model.apply(
            {"params": params["lm"]},
            pieces,
            positions,
            capture=(last,),
            stop_after=last,
            token_budget=None if token_budget is None else len(prefix) + token_budget,
        )
        resid_BTD = out.resid[last][-1]
        resid_BD = jnp.take_along_axis(resid_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
        return resid_BD.astype(jnp.float32) @ params["head"]["kernel"]

    def forward_flops(self, rows: int, tokens: int | float) -> float:
        """Model FLOPs of one forward over `rows` prompts of `tokens` tokens after the prefix, without the head."""
        return forward_flops(self.config, [(1, len(self.prompt.prefix)), (rows, tokens)])


def mse_loss(
    reconstructor: Reconstructor,
    params: Params,
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    activations_BD: Float[Array, "B D"],
    token_budget: int | None = None,
) -> Float[Array, "B"]:
    """Direction MSE of each row, 2(1 - cos), in 0..4."""
    return direction_mse(reconstructor(params, prompts_BT, lengths_B, token_budget), activations_BD)
