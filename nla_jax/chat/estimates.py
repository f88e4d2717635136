"""Estimates of the tokens, US dollars and time that asking a chat model will take, made before anything is asked."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from nla_jax.chat.config import ChatConfig, split_name
from nla_jax.chat.prices import CHARACTERS_PER_TOKEN, Price, guessed_tokens, load_prices, price_of
from nla_jax.chat.providers import AnthropicModel, OpenAIModel, scaled_count
from nla_jax.chat.replies import Failure, Parameters
from nla_jax.chat.store import open_store
from nla_jax.files import AnyPath, local_copy
from nla_jax.lm.files.weights import load_language_model

COUNTED_HERE = 500
"""Texts whose tokens a tokenizer counts here; those of the others follow from their lengths."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The tokens, money and time that answers to some prompts will take."""

    prompts: int
    """Different prompts."""
    cached: int
    """Those of them that are on record already and cost nothing."""
    input_tokens: int
    """Tokens that will be read, those of the instruction included."""
    output_tokens_at_most: int
    """Tokens that will be written if every answer and all thoughts are as long as allowed."""
    dollars: float | None
    """US dollars at most; None where the price of the model is not known."""
    usual_dollars: float | None
    """US dollars if answers cost what the model's earlier ones in the cache did; None where there are none."""
    seconds: float | None
    """Time if answers take as long as the model's earlier ones in the cache, with as many requests at a time as the
    config allows; None where there are none, and for message batches, which take up to a day."""
    counted_by: str
    """How tokens were counted."""


def estimate(
    model: str | ChatConfig,
    prompts: Sequence[str],
    *,
    instruction: str = "",
    max_tokens: int,
    temperature: float | None = None,
    prices: Mapping[str, Price] | None = None,
    cache: AnyPath | None = None,
) -> Estimate:
    """Estimate what answers to prompts will take. Nothing is asked, but Anthropic's API counts tokens of a few prompts.

    To know time and usual cost, have a few of the prompts answered first: the answers are kept.

    Args:
      model: the chat model's name, or a config that names it.
      prompts: what will be asked; equal prompts are asked once.
      instruction: the system prompt.
      max_tokens: most tokens of an answer.
      temperature: as in `CachedChat.answers`.
      prices: model -> price; None takes those of the config.
      cache: the file with earlier answers, if there is one.

    Raises:
      ValueError: no such provider, or a file with prices that holds something else.
      FileNotFoundError: no file with prices, or no such local model.
    """
    config = model if isinstance(model, ChatConfig) else ChatConfig(model)
    prices = load_prices(config.prices) if prices is None else prices
    parameters = Parameters(max_tokens, instruction, temperature, config.thinking_tokens)
    different = list(dict.fromkeys(prompts))
    fresh, usual, seconds = different, None, None
    if cache is not None and cache.exists():
        with local_copy(cache) as file, open_store(file, config.model, prices=prices) as store:
            found = store.find(different, parameters)
            fresh = [prompt for prompt in different if prompt not in found]
            usual, seconds = store.usual(config.batch), store.seconds()
    reading, counted_by = counted_tokens(config, [instruction, *fresh])
    if fresh and instruction:
        # The instruction is read before every prompt.
        reading += (len(fresh) - 1) * counted_tokens(config, [instruction])[0]
    local = split_name(config.model)[0] == "local"
    writing = len(fresh) * (max_tokens + (0 if local else config.thinking_tokens))
    price = price_of(config.model, prices)
    at_a_time = 1 if local else max(min(config.concurrency, len(fresh)), 1)
    return Estimate(
        prompts=len(different),
        cached=len(different) - len(fresh),
        input_tokens=reading if fresh else 0,
        output_tokens_at_most=writing,
        dollars=None
        if price is None
        else price.dollars(reading, writing, batch=config.batch)
        if fresh
        else 0.0,
        usual_dollars=usual and usual * len(fresh),
        seconds=None if seconds is None or config.batch else seconds * len(fresh) / at_a_time,
        counted_by=counted_by,
    )


def count_tokens(model: str, texts: Sequence[str]) -> int:
    """About how many tokens texts have for a chat model: see `counted_tokens`."""
    return counted_tokens(ChatConfig(model), texts)[0]


def counted_tokens(config: ChatConfig, texts: Sequence[str]) -> tuple[int, str]:
    """About how many tokens texts have, and who counted: the provider, its tokenizer here, or the number of characters.

    Raises:
      ValueError: no such provider.
      FileNotFoundError: no such local model.
    """
    texts = [text for text in texts if text]
    provider, name = split_name(config.model)
    if provider == "local":
        return scaled_count(texts, _tokenizer_of(name), COUNTED_HERE), "the model's tokenizer"
    try:
        api = AnthropicModel(config) if provider == "anthropic" else OpenAIModel(config)
        return api.count_tokens(texts), "the provider" if provider == "anthropic" else "tiktoken"
    except (Failure, ValueError, ModuleNotFoundError):
        # Without a key, a package or the network an estimate is still of use.
        return guessed_tokens(texts), f"characters, {CHARACTERS_PER_TOKEN} to a token"


@functools.cache
def _tokenizer_of(source: str):
    tokenizer = load_language_model(source, weights=False).tokenizer
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False))
