"""A loaded language model that answers prompts, each with its likeliest continuation or with one that is sampled."""

import contextlib
import functools
import hashlib
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
    """A loaded LM that answers: as an assistant if its tokenizer has a chat template, else on a new line."""

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
        self, prompts: Sequence[str], max_tokens: int, *, instruction: str = "", temperature: float = 0.0
    ) -> Iterator[tuple[str, str]]:
        """Yield each prompt with its answer up to the end of the turn or `max_tokens`, similar lengths together.

        At a temperature above 0 answers are sampled, keyed by the tokens of their own prompt: the same prompt gets the
        same answer, whatever is asked beside it.
        """
        read = [self.encode(prompt, instruction) for prompt in prompts]
        for chosen, size, length in batches_by_length(
            list(map(len, read)), self.batch_tokens, most_rows=ROWS
        ):
            rows = [read[i] for i in filled(chosen, size)]
            answers = self.write(
                rows,
                length=length,
                max_tokens=max_tokens,
                temperature=temperature,
                seeds=[seed_of(str(ids)) for ids in rows] if temperature else None,
            )
            for i, (answer, _) in zip(chosen, answers, strict=False):
                yield prompts[i], answer

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        length: int,
        max_tokens: int,
        temperature: float = 0.0,
        seeds: Sequence[int] | None = None,
    ) -> list[tuple[str, bool]]:
        """Write one batch of answers.

        Args:
          prompts: the tokens after which each answer begins; the beginning of one that is longer than `length` is cut.
          length: number of tokens that prompts are padded to. Every number of rows and length is compiled for.
          max_tokens: most tokens of an answer.
          temperature: 0 takes the likeliest tokens.
          seeds: decide what is sampled, one for each row, from 0 to 2^32 - 1; needed at a temperature above 0.

        Returns:
          Each answer, and whether the model ended it by itself.
        """
        if self._params is None:
            self._params = jit_aliasing(functools.partial(for_decoding, config=self.config))(self.lm.params)
        before, counts = pad([ids[:-1][-length:] for ids in prompts], length)
        last = np.array([[ids[-1]] for ids in prompts], np.int32)
        seeds = np.array([0] * len(prompts) if seeds is None else seeds, np.uint32)
        written = self._write(
            self._params, before, counts, last, seeds, np.float32(temperature), max_tokens=max_tokens
        )
        return [
            (self.lm.tokenizer.decode(ids[:count], skip_special_tokens=True).strip(), bool(ended))
            for ids, count, ended in zip(*to_host(written), strict=True)
        ]

    def _write_after(self, params, prompts_NT, lengths_N, last_N1, seeds_N, temperature, max_tokens):
        ones_N = jnp.ones(len(last_N1), jnp.int32)
        out = Transformer(self.config).apply(
            {"params": params},
            (prompts_NT, last_N1),
            (positions(prompts_NT, lengths_N), positions(last_N1, ones_N, lengths_N)),
        )
        return sample(
            params,
            self.config,
            out.segments,
            out.final_BTD[1][:, 0],
            lengths_N + 1,
            jax.vmap(jax.random.key)(seeds_N),
            group=1,
            max_tokens=max_tokens,
            closing=(self.end_token,),
            end_token=self.end_token,
            temperature=temperature,
        ).answers


def seed_of(name: str) -> int:
    """A seed for `LocalLM.write` by the hash of a name, from 0 to 2^32 - 1."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=4).digest(), "little")


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
