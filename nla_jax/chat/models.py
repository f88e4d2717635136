"""Chat models behind one protocol: many prompts in, as many answers out, in their order.

A model is one string, PROVIDER:MODEL. `anthropic:` and `openai:` are models behind APIs (providers.py), of which
hundreds of prompts are asked at a time (sending.py) or in message batches (batches.py). `local:` loads whatever
`nla_jax.lm.files.weights` does. Every answer is kept on disk before the next is waited for (store.py).
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import jax

from nla_jax.chat.batches import MessageBatches
from nla_jax.chat.config import ChatConfig, split_name
from nla_jax.chat.local import LocalLM
from nla_jax.chat.prices import LIST_PRICES, PRICES_OF, Price, guessed_tokens, load_prices, price_of
from nla_jax.chat.providers import AnthropicModel, OpenAIModel
from nla_jax.chat.replies import Allowance, Answer, Backend, Parameters, Reply
from nla_jax.chat.sending import Sender
from nla_jax.chat.store import BudgetSpent, open_store
from nla_jax.files import AnyPath, changing_copy, local_copy
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.weights import load_language_model
from nla_jax.process import progress_bar
from nla_jax.sharding.mesh import make_mesh
from nla_jax.sharding.placement import wait_for_all


@runtime_checkable
class ChatModel(Protocol):
    """A model that answers prompts."""

    name: str
    """The name under which its answers are shown."""

    def __call__(self, prompts: Sequence[str], *, max_tokens: int, desc: str | None = None) -> list[str]:
        """One answer for each prompt, of at most `max_tokens` tokens; `desc` names a progress bar."""


@dataclasses.dataclass
class CachedChat:
    """A chat model that pays for no answer twice: each is kept as soon as it comes.

    Answers are found by model, instruction, parameters and prompt. A prompt that has no answer, because the model
    refuses it or the request fails always, is kept with its problem and not asked again unless the config says so.
    Only the first of several processes asks; all of them read its answers.
    """

    name: str
    backend: Backend
    path: AnyPath
    """An SQLite file with every prompt and answer, and what they took; in a bucket it is up to a minute behind."""
    config: ChatConfig = ChatConfig()
    prices: Mapping[str, Price] = dataclasses.field(default_factory=lambda: LIST_PRICES)
    """Model -> price."""
    batches: MessageBatches | None = None
    """Message batches, of a provider that has them."""

    def __call__(self, prompts: Sequence[str], *, max_tokens: int, desc: str | None = None) -> list[str]:
        """The texts of `answers`, empty where there is no answer."""
        return [answer.text for answer in self.answers(prompts, max_tokens=max_tokens, desc=desc)]

    def answers(
        self,
        prompts: Sequence[str],
        *,
        instruction: str = "",
        max_tokens: int,
        temperature: float | None = None,
        desc: str | None = None,
    ) -> list[Answer]:
        """An answer, or the reason why there is none, for each prompt in order; equal prompts are asked once.

        Args:
          prompts: what the user says.
          instruction: the system prompt; empty sends none.
          max_tokens: most tokens of an answer.
          temperature: what answers are sampled at; None leaves it to an API, and takes the likeliest tokens of a local
            model.
          desc: name of a progress bar; None shows none.

        Raises:
          BudgetSpent: the budget allows no further request.
          RuntimeError: the model cannot be asked: the key or the name of the model is refused, or the server is gone.
            In both cases the answers so far are kept, and the same call goes on from there.
        """
        parameters = Parameters(max_tokens, _utf8(instruction), temperature, self.config.thinking_tokens)
        prompts = [_utf8(prompt) for prompt in prompts]
        if jax.process_index() == 0:
            self._ask(list(dict.fromkeys(prompts)), parameters, desc)
        wait_for_all("chat")
        with local_copy(self.path) as file, self._open(file) as store:
            found = store.find(prompts, parameters)
        return [found.get(prompt, Answer("", "it was not asked")) for prompt in prompts]

    def send_batches(
        self,
        prompts: Sequence[str],
        *,
        instruction: str = "",
        max_tokens: int,
        temperature: float | None = None,
    ) -> None:
        """Send message batches of the prompts that are neither answered nor under way, and wait for none of them.

        `answers` of the same prompts waits for them later. Batches are answered side by side, so that many that are
        sent at once take as long as one. Without message batches in the config nothing is done.

        Args:
          prompts: what the user says.
          instruction: as in `answers`, like the others.
          max_tokens: most tokens of an answer.
          temperature: what answers are sampled at.

        Raises:
          RuntimeError: as `answers`.
        """
        if not self.config.batch or jax.process_index() > 0:
            return
        parameters = Parameters(max_tokens, _utf8(instruction), temperature, self.config.thinking_tokens)
        prompts = list(dict.fromkeys(map(_utf8, prompts)))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with changing_copy(self.path) as (file, changed), self._open(file, changed) as store:
            store.guess = self._guess(prompts, parameters)
            known = store.find(prompts, parameters).keys() | store.in_batches(prompts, parameters)
            self.batches.send([prompt for prompt in prompts if prompt not in known], parameters, store)

    def spent(self) -> float:
        """US dollars that the answers in the cache took, over all runs and models; 0 where there is no cache yet."""
        if not self.path.exists():
            return 0.0
        with local_copy(self.path) as file, self._open(file) as store:
            return store.spent()

    def _open(self, file: Path, changed: Callable[[], None] = lambda: None):
        return open_store(file, self.name, prices=self.prices, budget=self.config.budget, changed=changed)

    def _ask(self, prompts: list[str], parameters: Parameters, desc: str | None) -> None:
        """Put all prompts on record that are not yet."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with changing_copy(self.path) as (file, changed), self._open(file, changed) as store:
            store.guess = self._guess(prompts, parameters)
            if self.batches is not None:
                self.batches.collect(prompts, parameters, store)
            if self.config.ask_again:
                store.forget_problems(prompts, parameters)
            found = store.find(prompts, parameters)
            fresh = [prompt for prompt in prompts if prompt not in found]
            asked = set(fresh)
            with progress_bar(desc, len(fresh), "answer") as bar:
                if self.config.batch:
                    self.batches.ask_all(fresh, parameters, store, bar.update)
                else:
                    for replies in self.backend(fresh, parameters, store):
                        store.keep(replies, parameters)
                        bar.update(sum(reply.prompt in asked for reply in replies))
            answered = store.find(fresh, parameters)
            if (left := len(fresh) - len(answered)) and not store.may_send(0, self.config.batch):
                raise BudgetSpent(
                    f"{self.name}: ${store.spent():.4f} were spent, the budget is ${self.config.budget:g}, and "
                    f"{left} of {len(prompts)} prompts are not asked. Answers so far are kept in {self.path}: with a "
                    "larger budget the same command goes on from there"
                )

    def _guess(self, prompts: list[str], parameters: Parameters) -> float:
        """US dollars that a first answer is taken to cost."""
        price = price_of(self.name, self.prices)
        if price is None or not prompts:
            return 0.0
        reading = guessed_tokens(prompts) / len(prompts) + guessed_tokens([parameters.instruction])
        return price.dollars(reading, parameters.max_tokens, batch=self.config.batch)


def open_chat_model(model: str | ChatConfig, cache: AnyPath) -> CachedChat:
    """A chat model, with its answers kept in an SQLite file.

    Args:
      model: its name, PROVIDER:MODEL, or a config that names it.
      cache: the file, which is made if need be.

    Raises:
      ValueError: no such provider, no key in the environment, or a budget for a model whose price is not known.
      FileNotFoundError: no such local model, or no file with prices.
      ModuleNotFoundError: the provider's SDK is not installed.
    """
    config = model if isinstance(model, ChatConfig) else ChatConfig(model)
    provider, name = split_name(config.model)
    prices = load_prices(config.prices)
    if config.budget is not None and price_of(config.model, prices) is None:
        raise ValueError(
            f"the budget is ${config.budget:g}, and the price of {config.model} is not known: the built-in list prices "
            f"are of {PRICES_OF}. Name a file with its price, or set no budget; docs/chat.md shows such a file"
        )
    batches = None
    if provider == "local":
        backend = _local(name)
    else:
        api = AnthropicModel(config) if provider == "anthropic" else OpenAIModel(config)
        backend = Sender(config.model, api.ask, config.concurrency)
        batches = MessageBatches(api) if provider == "anthropic" else None
    return CachedChat(config.model, backend, cache, config, prices, batches)


def _utf8(text: str) -> str:
    """A text without halves of surrogate pairs, which decoded tokens can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode()


def _local(source: str) -> Backend:
    resolve(source)

    @functools.cache
    def model() -> LocalLM:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
        lm = load_language_model(source, dtype=dtype)
        if lm.tokenizer.chat_template is None:
            raise ValueError(
                f"local:{source} has no chat template, so it cannot be asked; take an instruction-tuned model"
            )
        return LocalLM(lm, dataclasses.replace(lm.config, dtype=dtype, attention_dtype=dtype))

    def answers(
        prompts: Sequence[str], parameters: Parameters, allowance: Allowance
    ) -> Iterator[list[Reply]]:
        # The model is on one device, whatever mesh the run is on.
        with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):
            start = time.monotonic()
            replies = model()(
                prompts,
                parameters.max_tokens,
                instruction=parameters.instruction,
                temperature=parameters.temperature or 0.0,
            )
            for prompt, text in replies:
                problem = "" if text.strip() else "the answer is empty"
                seconds, start = time.monotonic() - start, time.monotonic()
                yield [Reply(prompt, Answer("" if problem else _utf8(text), problem), 0, 0, seconds)]

    return answers
