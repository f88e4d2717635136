"""What the target LM says about texts and activations: likelihoods, spliced activations.

Prompts and options are padded to a few lengths, so that few programs are compiled. Shape letters: N rows, G options
a row, V variants of an activation, T time, D model.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from nla_jax.chat.local import LocalLM
from nla_jax.lm.activations import residual_at
from nla_jax.lm.config import LMConfig
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.logits import logits, token_statistics
from nla_jax.lm.packing import first_kept, put, take
from nla_jax.lm.prompt_batches import OPTION_LENGTHS, batches_by_length, filled, pad, positions, rounded_up
from nla_jax.lm.transformer import Injection, Transformer
from nla_jax.process import progress_bar
from nla_jax.sharding.placement import to_host


class TargetLM:
    """The target LM as a judge and as a reader, in batches of at most `batch_tokens` tokens.

    Texts come in many lengths, and each is a program of its own: with stacked blocks they compile many times faster.
    """

    def __init__(self, lm: LanguageModel, config: LMConfig, layer: int, *, batch_tokens: int = 8192):
        """Take a loaded LM, its config with this run's dtypes, and the layer that is explained."""
        self.lm, self.config, self.layer, self.batch_tokens = lm, config, layer, batch_tokens
        self.tokenizer = lm.tokenizer
        self.model = Transformer(config, pack=True)
        self._likelihood = jax.jit(self._likelihood_of, static_argnames="token_budgets")
        self._divergence = jax.jit(self._divergence_of)
        self._last = jax.jit(self._last_of)

    @functools.cached_property
    def writer(self) -> LocalLM:
        """The same model as a writer of answers."""
        return LocalLM(self.lm, self.config, batch_tokens=self.batch_tokens)

    def encode(self, text: str) -> list[int]:
        """Tokens of a text as the model reads it from its start; one token at least."""
        start = self.tokenizer.bos_token_id
        ids = self.tokenizer.encode(text)
        return ids or [self.tokenizer.eos_token_id if start is None else start]

    def continuation(self, text: str) -> list[int]:
        """Tokens of a text that goes on from another."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def log_likelihood(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], desc: str | None = None
    ) -> tuple[Float[np.ndarray, "N G"], Float[np.ndarray, "N G"]]:
        """Log-probability (nats) of each option after its prompt, and each option's number of tokens.

        Args:
          prompts: one a row.
          options: as many for each row; they begin with a space if they go on with a new word.
          desc: names a progress bar.

        Raises:
          ValueError: rows with different numbers of options, or an empty option.
        """
        counts = sorted({len(row) for row in options})
        if len(counts) != 1 or len(prompts) != len(options):
            raise ValueError(
                f"{len(prompts)} prompts with {counts} options each: expected as many options for every prompt"
            )
        read = [self.encode(prompt) for prompt in prompts]
        answers = [[self.continuation(option) for option in row] for row in options]
        if any(not answer for row in answers for answer in row):
            raise ValueError("an option has no tokens; give every option a text")
        N, G = len(prompts), counts[0]
        total, tokens = np.zeros((N, G)), np.zeros((N, G))
        # An even number of options and as many rows as fit: what is empty costs little, and a new program much.
        width = G + G % 2
        longest = rounded_up(max(len(answer) for row in answers for answer in row), OPTION_LENGTHS)
        cut = batches_by_length(
            list(map(len, read)), self.batch_tokens, others=width * (longest + 1), same_rows=True
        )
        with progress_bar(desc, N, "row") as bar:
            for chosen, size, length in cut:
                before, at = pad(
                    [read[i][:-1][-length:] for i in chosen] + [[]] * (size - len(chosen)), length
                )
                # Each option is led by the prompt's last token, which predicts its first.
                led = [
                    [[read[i][-1], *one[:longest]] for one in answers[i]] + [[]] * (width - G) for i in chosen
                ]
                led += [[[]] * width] * (size - len(chosen))
                after, lengths = pad([one for row in led for one in row], longest + 1)
                budgets = _budget(int(at.sum() + lengths.sum())), _budget(int(lengths.sum()))
                found = self._likelihood(self.lm.params, before, at, after, lengths, token_budgets=budgets)
                total[chosen] = to_host(found).astype(np.float64).reshape(size, width)[: len(chosen), :G]
                tokens[chosen] = (lengths - 1).reshape(size, width)[: len(chosen), :G]
                bar.update(len(chosen))
        return total, tokens

    def _likelihood_of(self, params, prompts_NT, prompt_lengths_N, options_BT, lengths_B, token_budgets):
        of_all, of_options = token_budgets
        final_BTD = self._after(
            params, prompts_NT, prompt_lengths_N, options_BT, lengths_B, token_budget=of_all
        ).final_BTD[1]
        B, T = options_BT.shape
        # The head sees what is predicted: each option's tokens but the first, which is the prompt's last.
        mask_BT = jnp.arange(T - 1) < lengths_B[:, None] - 1
        kept_M = first_kept(mask_BT.reshape(-1), min(of_options, mask_BT.size))
        final_M1D = take(final_BTD[:, :-1].reshape(B * (T - 1), 1, -1), kept_M)
        targets_M1 = take(options_BT[:, 1:].reshape(-1, 1), kept_M)
        found_M1 = token_statistics(params, self.config, final_M1D, targets_M1).log_prob
        return jnp.sum(put(found_M1[:, 0], kept_M, mask_BT.size).reshape(B, T - 1) * mask_BT, axis=1)

    def _after(
        self, params, prompts_NT, prompt_lengths_N, later_BT, lengths_B, inject=None, token_budget=None
    ):
        """One pass over prompts and what follows each of them."""
        starts_B = jnp.repeat(prompt_lengths_N, len(later_BT) // len(prompts_NT))
        return self.model.apply(
            {"params": params},
            (prompts_NT, later_BT),
            (positions(prompts_NT, prompt_lengths_N), positions(later_BT, lengths_B, starts_B)),
            inject=inject,
            token_budget=token_budget,
        )

    def divergence(
        self, contexts: Sequence[str], vectors_NVD: Float[np.ndarray, "N V D"], desc: str | None = None
    ) -> tuple[Float[np.ndarray, "N V"], Float[np.ndarray, "N D"]]:
        """What the model loses when the activation at a context's end is exchanged: KL (nats) of its next token.

        Args:
          contexts: texts whose last token's residual stream is exchanged after block `layer`.
          vectors_NVD: raw vectors that are put there.
          desc: names a progress bar.

        Returns:
          KL(undisturbed || exchanged), and the activations that were there.
        """
        N, V, D = vectors_NVD.shape
        read = [self.encode(context) for context in contexts]
        found, there = np.zeros((N, V)), np.zeros((N, D), np.float32)
        with progress_bar(desc, N, "row") as bar:
            for chosen, size, length in batches_by_length(
                list(map(len, read)), self.batch_tokens, others=V + 1
            ):
                rows = filled(chosen, size)
                before, lengths = pad([read[i][:-1][-length:] for i in rows], length)
                last = np.array([read[i][-1] for i in rows], np.int32)
                kl, own = self._divergence(self.lm.params, before, lengths, last, vectors_NVD[rows])
                found[chosen], there[chosen] = (x[: len(chosen)] for x in to_host((kl, own)))
                bar.update(len(chosen))
        return found, there

    def _divergence_of(self, params, prompts_NT, lengths_N, last_N, vectors_NVD):
        N, V, _ = vectors_NVD.shape
        # Each row's last token once as it is and once a variant. What it is exchanged for is only known after the
        # block that is captured, so the true activations come from a pass of their own.
        ones_N = jnp.ones(N, jnp.int32)
        own = self._last_activation(params, prompts_NT, lengths_N, last_N)
        vectors = jnp.concatenate([own[:, None], vectors_NVD], axis=1).reshape(N * (V + 1), -1)
        later = jnp.repeat(last_N, V + 1)[:, None]
        inject = Injection(vectors, piece=1, slot=0, layer=self.layer)
        out = self._after(params, prompts_NT, lengths_N, later, jnp.repeat(ones_N, V + 1), inject)
        log_p = jax.nn.log_softmax(logits(params, self.config, out.final_BTD[1][:, 0]))
        log_p = log_p.reshape(N, V + 1, -1)
        return jnp.sum(jnp.exp(log_p[:, :1]) * (log_p[:, :1] - log_p[:, 1:]), axis=-1), own

    def _last_activation(self, params, prompts_NT, lengths_N, last_N):
        at = positions(prompts_NT, lengths_N), lengths_N[:, None]
        out = self.model.apply(
            {"params": params},
            (prompts_NT, last_N[:, None]),
            at,
            capture=(self.layer,),
            stop_after=self.layer,
        )
        return out.resid[self.layer][1][:, 0]

    def activations(self, texts: Sequence[str], last: int = 1) -> Float[np.ndarray, "N P D"]:
        """The activations (N, last, D) at the last tokens of texts that have so many.

        Raises:
          ValueError: a text with fewer tokens.
        """
        read = [self.encode(text) for text in texts]
        if (shortest := min(map(len, read))) < last:
            raise ValueError(f"a text has {shortest} tokens, fewer than the {last} that are asked for")
        found = np.zeros((len(texts), last, self.config.d_model), np.float32)
        for chosen, size, length in batches_by_length(list(map(len, read)), self.batch_tokens):
            tokens, lengths = pad([read[i][-length:] for i in filled(chosen, size)], length)
            at = (lengths[:, None] - last + np.arange(last)).astype(np.int32)
            found[chosen] = to_host(self._last(self.lm.params, tokens, at))[: len(chosen)]
        return found

    def _last_of(self, params, tokens_NT, at_NP):
        return residual_at(params, tokens_NT, at_NP, config=self.config, layer=self.layer, top=0)[0]


def _budget(tokens: int) -> int:
    """Room for that many tokens: a power of two, so that few programs are compiled."""
    return max(1 << (tokens - 1).bit_length(), 512)
