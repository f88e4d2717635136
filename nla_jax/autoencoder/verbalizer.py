"""The activation verbalizer (AV): a copy of the target LM that reads an injected activation and writes text.

Three pieces share work in one pass: the static prompt prefix runs once per call, marker and tail once per activation,
and the answers of an activation's group attend to both. Gradients flow through the shared pieces: it is exact.
Shape letters: N activations, G group, B = N * G answers, T time, D model.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nla_jax.autoencoder.prompts import VerbalizerPrompt
from nla_jax.lm.attention import PAD_POSITION
from nla_jax.lm.config import LMConfig
from nla_jax.lm.flops import forward_flops
from nla_jax.lm.logits import TokenStatistics, token_statistics
from nla_jax.lm.packing import Pieces, first_kept, put, take
from nla_jax.lm.sampling import Samples, for_decoding, in_compute_dtype, sample
from nla_jax.lm.transformer import EMBEDDING_LAYER, Injection, Params, Past, Transformer, unit


@dataclasses.dataclass(frozen=True)
class InjectionConfig:
    """Where and how an activation enters the AV."""

    layer: int = EMBEDDING_LAYER
    """-1 puts it into the embedding, k into the residual stream after block k."""
    mode: Literal["replace", "add"] = "replace"
    """Replace the marker's vector, or add to it at its own norm."""
    scale: float | Literal["p75", "sqrt_d"] = "p75"
    """Norm of a replacing vector: the 75th percentile of training norms, the square root of d, or a number."""
    affine: bool = False
    """Learn an affine map of the scaled vector, starting from the identity."""


@dataclasses.dataclass(frozen=True)
class Verbalizer:
    """The static description of an AV; hashable, so jit can specialize on it. Its weights come as `params`."""

    config: LMConfig
    prompt: VerbalizerPrompt
    injection: InjectionConfig
    scale: float
    """The number that `injection.scale` stands for."""
    remat: bool = False
    pack: bool = True
    """See `Transformer` for both."""

    def __post_init__(self):
        if self.injection.layer != EMBEDDING_LAYER:
            self.config.check_layer(self.injection.layer)

    @property
    def model(self) -> Transformer:
        """The transformer that reads whole prompts; apply it to `params["lm"]`."""
        return Transformer(self.config, self.remat, self.pack)

    def init(self, lm_params: Params) -> Params:
        """AV parameters from the target LM's: {"lm": ..., "affine": ... if the injection learns one}."""
        if not self.injection.affine:
            return {"lm": lm_params}
        d = self.config.d_model
        return {"lm": lm_params, "affine": {"kernel": jnp.zeros((d, d)), "bias": jnp.zeros(d)}}

    def frozen(self, params: Params) -> Params:
        """For use without gradients: the same results from half the memory where the LM computes in bfloat16."""
        return {**params, "lm": in_compute_dtype(params["lm"], self.config)}

    def for_decoding(self, params: Params) -> Params:
        """As `read` and `write` take them: see `sampling.for_decoding`."""
        return {**params, "lm": for_decoding(params["lm"], self.config)}

    def _inject(self, params: Params, activations_ND: Array) -> Injection:
        vectors_ND = unit(activations_ND.astype(jnp.float32)) * self.scale
        if "affine" in params:
            vectors_ND = vectors_ND + vectors_ND @ params["affine"]["kernel"] + params["affine"]["bias"]
        return Injection(vectors_ND, piece=1, slot=0, layer=self.injection.layer, mode=self.injection.mode)

    def read(self, params: Params, activations_ND: Float[Array, "N D"]) -> tuple[Past, Float[Array, "N D"]]:
        """Run the prompt around each activation.

        Returns:
          Per block, the prompt's segments (rows 1 and N), and the prompt's last final-norm output.
        """
        segments, (_, tail_NTD) = self._run(params, activations_ND, (), ())
        return segments, tail_NTD[:, -1]

    def hidden(
        self,
        params: Params,
        activations_ND: Float[Array, "N D"],
        responses_BT: Int[Array, "B T"],
        lengths_B: Int[Array, "B"],
        token_budget: int | None = None,
    ) -> Float[Array, "B T D"]:
        """The LM head's inputs that predict each answer token.

        Args:
          params: the AV's.
          activations_ND: one a group.
          responses_BT: answers; B is a multiple of N, groups adjacent.
          lengths_B: their tokens; what is returned past them is meaningless.
          token_budget: the number of all answers' tokens, at most (see `packing.budget_for_lengths`); padding beyond
            it is left out.
        """
        B, T = responses_BT.shape
        steps_T = jnp.arange(T)
        # The last token of an answer predicts nothing: it is padding here.
        real_BT = steps_T < lengths_B[:, None] - 1
        positions_BT = jnp.where(real_BT, self.prompt.length + steps_T, PAD_POSITION)
        answers = ((responses_BT[:, :-1],), (positions_BT[:, :-1],)) if T > 1 else ((), ())
        kept = token_budget - B if token_budget is not None else None
        _, (_, tail_NTD, *final_BTD) = self._run(params, activations_ND, *answers, kept)
        first_B1D = jnp.repeat(tail_NTD[:, -1:], B // len(tail_NTD), axis=0)
        return jnp.concatenate([first_B1D, *final_BTD], axis=1)

    def _run(
        self,
        params: Params,
        activations_ND: Array,
        answers: Pieces,
        answer_positions: Pieces,
        answer_budget: int | None = None,
    ) -> tuple[Past, Pieces]:
        """One pass over the prefix (one row), marker and tail (N rows), and answers (B rows) if there are any.

        Returns the segments and the final-norm outputs, a piece each.
        """
        prompt, N = self.prompt, len(activations_ND)
        tail_T = jnp.array((prompt.marker, *prompt.tail))
        tail_NT = jnp.broadcast_to(tail_T, (N, len(tail_T)))
        prefix_positions_1T = jnp.arange(len(prompt.prefix))[None]
        tail_positions_NT = jnp.broadcast_to(len(prompt.prefix) + jnp.arange(len(tail_T)), tail_NT.shape)
        out = self.model.apply(
            {"params": params["lm"]},
            (jnp.array([prompt.prefix]), tail_NT, *answers),
            (prefix_positions_1T, tail_positions_NT, *answer_positions),
            inject=self._inject(params, activations_ND),
            token_budget=None if answer_budget is None else len(prompt.prefix) + tail_NT.size + answer_budget,
        )
        return out.segments, out.final_BTD

    def statistics(
        self,
        params: Params,
        activations_ND: Float[Array, "N D"],
        responses_BT: Int[Array, "B T"],
        lengths_B: Int[Array, "B"],
        temperature: float | Float[Array, ""] = 1.0,
        token_budget: int | None = None,
    ) -> TokenStatistics:
        """Log-probability and entropy (nats) of every answer token; entries past a length are meaningless.

        `token_budget` is what `hidden` takes.
        """
        final_BTD = self.hidden(params, activations_ND, responses_BT, lengths_B, token_budget)
        return self.head_statistics(params, final_BTD, responses_BT, lengths_B, temperature, token_budget)

    def head_statistics(
        self,
        params: Params,
        final_BTD: Float[Array, "B T D"],
        responses_BT: Int[Array, "B T"],
        lengths_B: Int[Array, "B"],
        temperature: float | Float[Array, ""] = 1.0,
        token_budget: int | None = None,
    ) -> TokenStatistics:
        """`statistics` from what `hidden` returned."""
        B, T = responses_BT.shape
        head = functools.partial(token_statistics, params["lm"], self.config, temperature=temperature)
        if token_budget is None or not self.pack:
            return head(final_BTD, responses_BT)
        kept_M = first_kept(token_mask(lengths_B, T).reshape(-1) > 0, token_budget)
        final_M1D = take(final_BTD.reshape(B * T, 1, -1), kept_M)
        statistics = head(final_M1D, take(responses_BT.reshape(B * T, 1), kept_M))
        return jax.tree.map(lambda x_M1: put(x_M1, kept_M, B * T).reshape(B, T), statistics)

    def sample(
        self,
        params: Params,
        activations_ND: Float[Array, "N D"],
        key: Array,
        *,
        group: int,
        max_tokens: int,
        temperature: float | Float[Array, ""] = 1.0,
        scan: bool = False,
    ) -> Samples:
        """Write `group` explanations for each activation; rows of a group are adjacent.

        `scan` leaves stacked blocks stacked: faster to compile, slower to run (see `sampling.for_decoding`).
        """
        params = self.frozen(params) if scan else self.for_decoding(params)
        past, final_ND = self.read(params, activations_ND)
        return self.write(
            params, past, final_ND, key, group=group, max_tokens=max_tokens, temperature=temperature
        )

    def write(
        self,
        params: Params,
        past: Past,
        final_ND: Float[Array, "N D"],
        key: Array,
        *,
        group: int,
        max_tokens: int,
        temperature: float | Float[Array, ""] = 1.0,
    ) -> Samples:
        """Sample explanations from what `read` returned, with parameters as `for_decoding` gives them."""
        return sample(
            params["lm"],
            self.config,
            past,
            final_ND,
            self.prompt.length,
            key,
            group=group,
            max_tokens=max_tokens,
            closing=self.prompt.closing,
            end_token=self.prompt.end_token,
            temperature=temperature,
        )

    def forward_flops(self, activations: int, answers: int, tokens: int | float) -> float:
        """Model FLOPs of one forward that gives the log-probs of `answers` of `tokens` tokens each."""
        prompt = [(1, len(self.prompt.prefix)), (activations, 1 + len(self.prompt.tail))]
        return forward_flops(self.config, [*prompt, (answers, tokens)], answers * tokens)

    def decode_flops(self, answers: int, tokens: int | float) -> float:
        """Model FLOPs of decoding `answers` of `tokens` tokens each from a prompt that was read."""
        return forward_flops(self.config, [(answers, tokens)], answers * tokens, seen=self.prompt.length)


def token_mask(lengths_B: Int[Array, "B"], T: int) -> Float[Array, "B T"]:
    """1 for the first `length` tokens of each row, 0 after."""
    return (jnp.arange(T) < lengths_B[:, None]).astype(jnp.float32)


def sft_loss(
    verbalizer: Verbalizer,
    params: Params,
    activations_ND: Float[Array, "N D"],
    responses_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    token_budget: int | None = None,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Summed negative log-likelihood (nats) of the answers, and the number of tokens it is summed over."""
    mask_BT = token_mask(lengths_B, responses_BT.shape[1])
    log_prob_BT = verbalizer.statistics(
        params, activations_ND, responses_BT, lengths_B, token_budget=token_budget
    ).log_prob
    return -jnp.sum(log_prob_BT * mask_BT), jnp.sum(mask_BT)
