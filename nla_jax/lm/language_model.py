"""A language model in memory, with what a researcher asks of it: residual streams of texts, and continuations."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array
from transformers import PreTrainedTokenizerFast

from nla_jax.lm.activations import Activations, residual_of
from nla_jax.lm.chat_template import Message, end_token
from nla_jax.lm.config import LMConfig
from nla_jax.lm.prompt_batches import PROMPT_LENGTHS, positions, rounded_up
from nla_jax.lm.sampling import Samples, for_decoding, in_compute_dtype, sample
from nla_jax.lm.tokenized import TokenizedText, tokenize_chat, tokenize_text
from nla_jax.lm.transformer import Injection, Params, Transformer


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A language model in memory: everything that is needed to run it on text."""

    config: LMConfig
    params: dict[str, Any]
    """Nested parameter tree, as `init_params` makes it."""
    tokenizer: PreTrainedTokenizerFast
    name: str
    """The spec it was loaded from; a local path is made absolute."""

    def tokenize(
        self, text: str | None = None, *, messages: Sequence[Message] | None = None
    ) -> TokenizedText:
        """Tokens of a text, or of a conversation through the model's chat template.

        Raises:
          ValueError: neither or both are given, there is nothing to encode, or the template refuses the messages.
        """
        if (text is None) == (messages is None):
            raise ValueError("give either a text or messages")
        if messages is not None:
            return tokenize_chat(self.tokenizer, messages)
        return tokenize_text(self.tokenizer, text)

    def activations(
        self,
        text: str | Sequence[str] | None = None,
        *,
        messages: Sequence[Message] | None = None,
        layer: int,
    ) -> Activations | list[Activations]:
        """The residual stream after a block, at every token but a BOS.

        Args:
          text: a text, or several.
          messages: a conversation, instead of a text.
          layer: the block, counted from 0.

        Returns:
          The activations of the text; a list of them where several texts are given.

        Raises:
          ValueError: a layer that the model does not have, a text without tokens or over the context length, or
            messages that the chat template refuses.
        """
        if text is not None and not isinstance(text, str):
            return [self.activations(one, layer=layer) for one in text]
        source = self.tokenize(text, messages=messages)
        vectors_TD = residual_of(self.params, self.config, source.ids, layer)
        return Activations(
            vectors_TD[list(source.default_positions)], layer, source, source.default_positions
        )

    def generate(
        self,
        prompt: str | None = None,
        *,
        messages: Sequence[Message] | None = None,
        inject: Injection | None = None,
        max_tokens: int = 40,
        temperature: float = 0.0,
        samples: int = 1,
        seed: int = 0,
    ) -> str | list[str]:
        """Continue a prompt, or answer a conversation.

        Args:
          prompt: plain text.
          messages: a conversation, instead of a prompt.
          inject: a change of the residual stream at a token of the prompt, `slot`, while it is read.
          max_tokens: of the continuation; it ends earlier at the model's own end token.
          temperature: 0 takes the likeliest token.
          samples: how many continuations; more than one needs a temperature above 0 to differ.
          seed: of the samples.

        Returns:
          The continuation; a list of them for more than one sample.

        Raises:
          ValueError: an injection outside the prompt, a prompt without tokens, or more tokens than the model's context
            has.
        """
        source = self.tokenize(prompt, messages=messages)
        if inject is not None and not 0 <= inject.slot < len(source):
            raise ValueError(
                f"slot {inject.slot} is outside the prompt: it has tokens 0 to {len(source) - 1}"
            )
        limit = self.config.max_positions
        if len(source) + max_tokens > limit:
            raise ValueError(
                f"a prompt of {len(source)} tokens and {max_tokens} more exceed the {limit} that the model was made "
                "for; shorten the prompt, or lower max_tokens"
            )
        end = end_token(self.tokenizer, chat=self.tokenizer.chat_template is not None)
        length = max(rounded_up(len(source), PROMPT_LENGTHS), len(source))
        tokens_1T = np.zeros((1, length), np.int32)
        tokens_1T[0, : len(source)] = source.ids
        written = _continued(
            self.params,
            tokens_1T,
            np.array([len(source)], np.int32),
            jax.random.key(seed),
            np.float32(temperature),
            inject,
            config=self.config,
            group=samples,
            max_tokens=max_tokens,
            end=end,
        )
        rows = zip(np.asarray(written.tokens_BT), np.asarray(written.lengths_B), strict=True)
        texts = [self.tokenizer.decode(ids[:count], skip_special_tokens=True) for ids, count in rows]
        return texts[0] if samples == 1 else texts


@functools.partial(jax.jit, static_argnames=("config", "group", "max_tokens", "end"))
def _continued(
    params: Params,
    tokens_1T: Array,
    lengths_1: Array,
    key: Array,
    temperature: Array,
    inject: Injection | None,
    *,
    config: LMConfig,
    group: int,
    max_tokens: int,
    end: int,
) -> Samples:
    """Read one padded prompt and sample after it; stacked blocks stay stacked."""
    prepare = in_compute_dtype if "blocks" in params else for_decoding
    params = prepare(params, config)
    at_1T = positions(tokens_1T, lengths_1)
    out = Transformer(config).apply({"params": params}, (tokens_1T,), (at_1T,), inject=inject)
    final_1D = jnp.take_along_axis(out.final_BTD[0], (lengths_1 - 1)[:, None, None], axis=1)[:, 0]
    return sample(
        params,
        config,
        out.segments,
        final_1D,
        lengths_1,
        key,
        group=group,
        max_tokens=max_tokens,
        closing=(end,),
        end_token=end,
        temperature=temperature,
    )
