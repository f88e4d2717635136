"""The target LM as an instrument: likelihoods of texts, activations, and predictions with activations exchanged.

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
    """The target LM in batches of at most `batch_tokens` tokens.

    Every padded length is a program of its own; with stacked blocks, the programs compile many times faster.
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
        """Tokens of a text that the model reads from its start, with the BOS if there is one; at least one token."""
        start = self.tokenizer.bos_token_id
        ids = self.tokenizer.encode(text)
        return ids or [self.tokenizer.eos_token_id if start is None else start]

    def continuation(self, text: str) -> list[int]:
        """Tokens of a text that continues another, without BOS."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def log_likelihood(
        self, prompts: Sequence[str], options: Sequence[Sequence[str]], desc: str | None = None
    ) -> tuple[Float[np.ndarray, "N G"], Float[np.ndarray, "N G"]]:
        """Log-probability (nats) of each option after its prompt, and each option's number of tokens.

        Args:
          prompts: one prompt a row.
          options: the same number of options for every row; one that begins a new word starts with a space.
          desc: name of the progress bar; None shows none.

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
        # Numbers of options are made even and all batches get the same rows: padding costs little, a program much.
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
                nats = self._likelihood(self.lm.params, before, at, after, lengths, token_budgets=budgets)
                total[chosen] = to_host(nats).astype(np.float64).reshape(size, width)[: len(chosen), :G]
                tokens[chosen] = (lengths - 1).reshape(size, width)[: len(chosen), :G]
                bar.update(len(chosen))
        return total, tokens

    def _likelihood_of(self, params, prompts_NT, prompt_lengths_N, options_BT, lengths_B, token_budgets):
        of_all, of_options = token_budgets
        final_BTD = self._after(
            params, prompts_NT, prompt_lengths_N, options_BT, lengths_B, token_budget=of_all
        ).final_BTD[1]
        B, T = options_BT.shape
        # The head runs only on predicted tokens: all of an option's but the first, which is the prompt's last.
        mask_BT = jnp.arange(T - 1) < lengths_B[:, None] - 1
        kept_M = first_kept(mask_BT.reshape(-1), min(of_options, mask_BT.size))
        final_M1D = take(final_BTD[:, :-1].reshape(B * (T - 1), 1, -1), kept_M)
        targets_M1 = take(options_BT[:, 1:].reshape(-1, 1), kept_M)
        log_prob_M1 = token_statistics(params, self.config, final_M1D, targets_M1).log_prob
        return jnp.sum(put(log_prob_M1[:, 0], kept_M, mask_BT.size).reshape(B, T - 1) * mask_BT, axis=1)

    def _after(
        self, params, prompts_NT, prompt_lengths_N, later_BT, lengths_B, inject=None, token_budget=None
    ):
        """One forward over prompts and the rows that follow each of them."""
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
        """KL divergence (nats) of the next token when another vector replaces the activation at a context's end.

        Args:
          contexts: texts whose last token's residual stream is exchanged after block `layer`.
          vectors_NVD: raw vectors to put there, V variants for each context.
          desc: name of the progress bar; None shows none.

        Returns:
          KL(undisturbed || exchanged), and the activations that were exchanged.
        """
        N, V, D = vectors_NVD.shape
        read = [self.encode(context) for context in contexts]
        kl_NV, there_ND = np.zeros((N, V)), np.zeros((N, D), np.float32)
        with progress_bar(desc, N, "row") as bar:
            for chosen, size, length in batches_by_length(
                list(map(len, read)), self.batch_tokens, others=V + 1
            ):
                rows = filled(chosen, size)
                before, lengths = pad([read[i][:-1][-length:] for i in rows], length)
                last = np.array([read[i][-1] for i in rows], np.int32)
                kl, there = to_host(
                    self._divergence(self.lm.params, before, lengths, last, vectors_NVD[rows])
                )
                kl_NV[chosen], there_ND[chosen] = kl[: len(chosen)], there[: len(chosen)]
                bar.update(len(chosen))
        return kl_NV, there_ND

    def _divergence_of(self, params, prompts_NT, lengths_N, last_N, vectors_NVD):
        N, V, _ = vectors_NVD.shape
        # Each row's last token runs once undisturbed and once a variant. The undisturbed run injects the true
        # activation, which a pass of its own has to compute first.
        ones_N = jnp.ones(N, jnp.int32)
        true_ND = self._last_activation(params, prompts_NT, lengths_N, last_N)
        vectors = jnp.concatenate([true_ND[:, None], vectors_NVD], axis=1).reshape(N * (V + 1), -1)
        later = jnp.repeat(last_N, V + 1)[:, None]
        inject = Injection(vectors, piece=1, slot=0, layer=self.layer)
        out = self._after(params, prompts_NT, lengths_N, later, jnp.repeat(ones_N, V + 1), inject)
        log_p = jax.nn.log_softmax(logits(params, self.config, out.final_BTD[1][:, 0]))
        log_p = log_p.reshape(N, V + 1, -1)
        return jnp.sum(jnp.exp(log_p[:, :1]) * (log_p[:, :1] - log_p[:, 1:]), axis=-1), true_ND

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
        """The activations (N, last, D) at the `last` last tokens of texts.

        Raises:
          ValueError: a text has fewer tokens.
        """
        read = [self.encode(text) for text in texts]
        if (shortest := min(map(len, read))) < last:
            raise ValueError(f"a text has {shortest} tokens, fewer than the {last} that are asked for")
        activations_NPD = np.zeros((len(texts), last, self.config.d_model), np.float32)
        for chosen, size, length in batches_by_length(list(map(len, read)), self.batch_tokens):
            tokens, lengths = pad([read[i][-length:] for i in filled(chosen, size)], length)
            at = (lengths[:, None] - last + np.arange(last)).astype(np.int32)
            activations_NPD[chosen] = to_host(self._last(self.lm.params, tokens, at))[: len(chosen)]
        return activations_NPD

    def _last_of(self, params, tokens_NT, at_NP):
        (streams,), _ = residual_at(params, tokens_NT, at_NP, config=self.config, layers=(self.layer,), top=0)
        return streams


def _budget(tokens: int) -> int:
    """A token budget that holds `tokens`: a power of two, so that few programs are compiled."""
    return max(1 << (tokens - 1).bit_length(), 512)
