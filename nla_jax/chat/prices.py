"""What chat models cost: list prices that a user's file overrides, tokens of texts, and estimates before asking."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

import yaml

from nla_jax.chat.config import split_name
from nla_jax.files import Place, as_path

PRICES_OF = "2026-11-26"
"""The day of the list prices below. Providers change theirs without notice; a file with prices overrides them."""
BATCH_SHARE = 0.5
"""What a message batch costs, as a share of the same requests alone."""
CHARACTERS_PER_TOKEN = 4
"""How many characters a token has on average, where nobody counted."""
_SHAPE = (
    "expected a price in US dollars for a million tokens of each model, as in "
    '{"openai:gpt-4.1": {"input": 2, "output": 8}}'
)


@dataclasses.dataclass(frozen=True)
class Price:
    """US dollars for a million tokens."""

    input: float
    output: float

    def dollars(self, input_tokens: float | int, output_tokens: float | int, *, batch: bool = False) -> float:
        """What these tokens cost."""
        share = BATCH_SHARE if batch else 1.0
        return share * (self.input * input_tokens + self.output * output_tokens) / 1e6


LIST_PRICES = {
    "anthropic:claude-fable-5-2": Price(8.0, 40.0),
    "anthropic:claude-fable-5-1": Price(10.0, 50.0),
    "anthropic:claude-fable-5": Price(10.0, 50.0),
    "anthropic:claude-opus-5-5": Price(4.0, 20.0),
    "anthropic:claude-opus-5": Price(5.0, 25.0),
    "anthropic:claude-opus-4-8": Price(5.0, 25.0),
    "anthropic:claude-sonnet-5-5": Price(2.0, 10.0),
    "anthropic:claude-sonnet-5": Price(2.0, 10.0),
    "anthropic:claude-sonnet-4-6": Price(3.0, 15.0),
    "anthropic:claude-sonnet-4-5": Price(3.0, 15.0),
    # Five times as much where a prompt is longer than 100,000 tokens.
    "anthropic:claude-haiku-5-5": Price(0.1, 0.5),
    "anthropic:claude-haiku-4-5": Price(1.0, 5.0),
    # GPT-6 models cost more where a prompt is longer than 272,000 tokens.
    "openai:gpt-6-astra": Price(10.0, 50.0),
    "openai:gpt-6.1-sol": Price(2.0, 10.0),
    "openai:gpt-6.1-terra": Price(1.0, 5.0),
    "openai:gpt-6-sol": Price(2.0, 10.0),
    "openai:gpt-6-luna": Price(0.1, 0.5),
    "openai:gpt-5.6-sol": Price(4.0, 20.0),
    "openai:gpt-5.6-terra": Price(2.0, 12.0),
    "openai:gpt-5.6-luna": Price(0.2, 1.2),
    "openai:gpt-5.4": Price(2.5, 15.0),
    "openai:gpt-5.4-mini": Price(0.75, 4.5),
    "openai:gpt-5.4-nano": Price(0.2, 1.25),
    "openai:gpt-4.1": Price(2.0, 8.0),
    "openai:gpt-4.1-mini": Price(0.4, 1.6),
    "openai:gpt-4o-mini": Price(0.15, 0.6),
}
"""Chat model -> its list price on `PRICES_OF` for a prompt of ordinary length, without discounts."""
FREE = Price(0.0, 0.0)
"""The price of a model that runs here."""


def load_prices(file: Place | None) -> dict[str, Price]:
    """The list prices, with those of a user's file before them.

    Args:
      file: JSON or YAML, {"PROVIDER:MODEL": {"input": DOLLARS, "output": DOLLARS}} for a million tokens; None reads
        none.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds something else than prices.
    """
    if file is None:
        return dict(LIST_PRICES)
    path = as_path(file)
    if not path.exists():
        raise FileNotFoundError(f"there is no file with prices at {path}; write one, or name none")
    try:
        given = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is neither JSON nor YAML ({error}); {_SHAPE}") from error
    if not isinstance(given, Mapping):
        raise ValueError(f"{path} holds {given!r}; {_SHAPE}")
    return LIST_PRICES | {
        split_name(name) and name: _price(path, name, price) for name, price in given.items()
    }


def _price(path, name: str, price: object) -> Price:
    if isinstance(price, Mapping) and set(price) == {"input", "output"}:
        numbers = [price["input"], price["output"]]
        if all(isinstance(n, int | float) and 0 <= n < math.inf for n in numbers):
            return Price(*map(float, numbers))
    raise ValueError(f"{path}: the price of {name} is {price!r}; {_SHAPE}")


def price_of(name: str, prices: Mapping[str, Price]) -> Price | None:
    """The price of a chat model; None where none is known.

    A model with a date at its end, as in gpt-5.4-mini-2026-03-17, has the price of the same model without it.
    """
    if name.startswith("local:"):
        return FREE
    return prices.get(name) or prices.get(re.sub(r"-(\d{8}|\d{4}-\d\d-\d\d)$", "", name))


def guessed_tokens(texts: Sequence[str]) -> int:
    """About how many tokens texts have, from their number of characters."""
    return math.ceil(sum(map(len, texts)) / CHARACTERS_PER_TOKEN)
