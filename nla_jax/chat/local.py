"""A loaded language model that answers prompts, each with its likeliest continuation."""

import contextlib
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from transformers import PreTrainedTokenizerBase

from nla_jax.lm.chat_template import end_token, render_chat, render_messages
from nla_jax.lm.config import LMConfig
from nla_jax.lm.language_model import LanguageModel
from nla_jax.lm.prompt_batches import batches_by_length, filled, pad, positions
from nla_jax.lm.sampling import for_decoding, sample
from nla_jax.lm.transformer import Transformer
from nla_jax.sharding.aliasing import jit_aliasing
from nla_jax.sharding.placement import to_host

ROWS = 32
"""Most answers that are written in one batch."""


class LocalLM:
    """A loaded LM that answers greedily: as an assistant if its tokenizer has a chat template, else on a new line."""

    def __init__(self, lm: LanguageModel, config: LMConfig, *, batch_tokens: int = 8192):
        """Take a loaded LM, its config with the dtypes to compute in, and how many prompt tokens a batch may have."""
        self.lm, self.config, self.batch_tokens = lm, config, batch_tokens
        self.has_template = lm.tokenizer.chat_template is not None
        self.end_token = end_token(lm.tokenizer, chat=self.has_template)
        self._params = None
        self._write = jax.jit(self._write_after, static_argnames="max_tokens")

    def encode(self, prompt: str, instruction: str = "") -> list[int]:
        """The tokens after which an answer to a prompt begins.

        An instruction is the system message, or stands before the prompt where there is no place for one.
        """
        tokenizer = self.lm.tokenizer
        if self.has_template:
            text = render_with_instruction(tokenizer, prompt, instruction)
            return tokenizer.encode(text, add_special_tokens=False)
        return tokenizer.encode(f"{_before(instruction, prompt)}\n")

    def __call__(
        self, prompts: Sequence[str], max_tokens: int, *, instruction: str = ""
    ) -> Iterator[tuple[str, str]]:
        """Yield each prompt with its answer up to the end of the turn or `max_tokens`, similar lengths together."""
        if self._params is None:
            self._params = jit_aliasing(functools.partial(for_decoding, config=self.config))(self.lm.params)
        read = [self.encode(prompt, instruction) for prompt in prompts]
        for chosen, size, length in batches_by_length(
            list(map(len, read)), self.batch_tokens, most_rows=ROWS
        ):
            rows = filled(chosen, size)
            before, counts = pad([read[i][:-1][-length:] for i in rows], length)
            last = np.array([[read[i][-1]] for i in rows], np.int32)
            written = to_host(self._write(self._params, before, counts, last, max_tokens=max_tokens))
            for i, tokens, n in zip(chosen, *written, strict=False):
                yield prompts[i], self.lm.tokenizer.decode(tokens[:n], skip_special_tokens=True).strip()

    def _write_after(self, params, prompts_NT, lengths_N, last_N1, max_tokens):
        ones_N = jnp.ones(len(last_N1), jnp.int32)
        out = Transformer(self.config).apply(
            {"params": params},
            (prompts_NT, last_N1),
            (positions(prompts_NT, lengths_N), positions(last_N1, ones_N, lengths_N)),
        )
        answers = sample(
            params,
            self.config,
            out.segments,
            out.final_BTD[1][:, 0],
            lengths_N + 1,
            jax.random.key(0),
            group=1,
            max_tokens=max_tokens,
            closing=(self.end_token,),
            end_token=self.end_token,
            temperature=0.0,
        )
        return answers.tokens_BT, answers.lengths_B


def render_with_instruction(tokenizer: PreTrainedTokenizerBase, prompt: str, instruction: str) -> str:
    """A user message with a generation prompt, after an instruction, as the chat template writes them.

    The instruction is the system message; if the template refuses or drops system messages, it opens the user message.

    Raises:
      ValueError: no chat template, or one that refuses the user message.
    """
    user = {"role": "user", "content": prompt}
    if instruction:
        with contextlib.suppress(ValueError):
            text = render_messages(
                tokenizer, [{"role": "system", "content": instruction}, user], add_generation_prompt=True
            )
            if instruction.strip() in text:
                return text
    return render_chat(tokenizer, _before(instruction, prompt))


def _before(instruction: str, prompt: str) -> str:
    return f"{instruction}\n\n{prompt}" if instruction else prompt
