"""Models behind APIs: one request of Anthropic's or OpenAI's protocol, and what its failure means.

The official SDKs send the requests. They take keys and base URLs from their own environment variables, so a server that
speaks OpenAI's protocol is reached by OPENAI_BASE_URL. Their own retries are off: sending.py decides about those.
"""

import contextlib
import importlib
import time
from collections.abc import Callable, Iterator, Sequence
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import Any

from nla_jax.chat.config import ChatConfig, split_name
from nla_jax.chat.replies import Answer, Failure, Parameters, Reply

_BUSY = (429, 529)
_FOR_ALL = {
    401: "the key is refused",
    402: "the account has no credit",
    403: "the key may not do this",
    404: "there is no such model, or the base URL is wrong",
}
"""Status -> what it says of every request."""
_OUT_OF_CREDIT = ("insufficient_quota", "credit balance", "billing")
"""What providers write where an account is empty, under a status that means something else."""
_COUNTED = 20
"""Prompts whose tokens the provider counts; those of the others follow from their lengths."""


class AnthropicModel:
    """A model behind Anthropic's API."""

    def __init__(self, config: ChatConfig):
        """Open a client.

        Raises:
          ValueError: no key in the environment.
          ModuleNotFoundError: the SDK is not installed.
        """
        self.config, (_, self.model) = config, split_name(config.model)
        self.sdk = _sdk("anthropic")
        self.client = self.sdk.Anthropic(max_retries=0)
        if not (self.client.api_key or self.client.auth_token or self.client.credentials):
            raise ValueError(f"{config.model} needs a key: set ANTHROPIC_API_KEY")

    def body(self, prompt: str, parameters: Parameters) -> dict[str, Any]:
        """The fields of a request."""
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": parameters.max_tokens + parameters.thinking_tokens,
        }
        if parameters.instruction:
            fields["system"] = parameters.instruction
        if parameters.temperature is not None:
            fields["temperature"] = parameters.temperature
        return fields

    def ask(self, prompt: str, parameters: Parameters) -> Reply:
        """Send one prompt and wait for its reply.

        Raises:
          Failure: there is none.
        """
        with failures(self.sdk):
            body, timeout = self.body(prompt, parameters), _timeout(self.config, parameters)
            # The SDK has no argument for the temperature any more, which its latest models refuse.
            further = {name: body.pop(name) for name in ("temperature",) if name in body}
            message = self.client.messages.create(**body, extra_body=further, timeout=timeout)
            return self.reply(prompt, message)

    def reply(self, prompt: str, message: Any, *, batch: bool = False) -> Reply:
        """What a message of the protocol says, with what it took."""
        text = "".join(block.text for block in message.content if block.type == "text")
        problem = _problem(
            text, refused=message.stop_reason == "refusal", cut=message.stop_reason == "max_tokens"
        )
        usage = message.usage
        cached = [usage.cache_creation_input_tokens, usage.cache_read_input_tokens]
        reading = sum(filter(None, [usage.input_tokens, *cached]))
        return Reply(prompt, _answer(text, problem), reading, usage.output_tokens, batch=batch)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of texts as the API counts them, which costs nothing: each of a few, and the others by their length.

        Raises:
          Failure: the API does not count.
        """

        def count(text: str) -> int:
            messages = [{"role": "user", "content": text}]
            return self.client.messages.count_tokens(
                model=self.model, messages=messages, timeout=30
            ).input_tokens

        with failures(self.sdk):
            return scaled_count(texts, count)


class OpenAIModel:
    """A model behind OpenAI's API, or any server of that protocol."""

    def __init__(self, config: ChatConfig):
        """Open a client.

        Raises:
          ValueError: no key in the environment.
          ModuleNotFoundError: the SDK is not installed.
        """
        self.config, (_, self.model) = config, split_name(config.model)
        self.sdk = _sdk("openai")
        try:
            self.client = self.sdk.OpenAI(max_retries=0)
        except self.sdk.OpenAIError as error:
            raise ValueError(
                f"{config.model} needs a key: set OPENAI_API_KEY (to anything, for a server of your own that asks for "
                "none)"
            ) from error

    def ask(self, prompt: str, parameters: Parameters) -> Reply:
        """Send one prompt and wait for its reply.

        Raises:
          Failure: there is none.
        """
        messages = [{"role": "user", "content": prompt}]
        if parameters.instruction:
            messages.insert(0, {"role": "system", "content": parameters.instruction})
        limit = parameters.max_tokens + parameters.thinking_tokens
        fields: dict[str, Any] = {"max_completion_tokens": limit}
        if self.client.base_url.host != "api.openai.com":
            # Other servers may know the earlier name alone, which some models of OpenAI refuse.
            fields["max_tokens"] = limit
        if parameters.temperature is not None:
            fields["temperature"] = parameters.temperature
        with failures(self.sdk):
            completion = self.client.chat.completions.create(
                model=self.model, messages=messages, timeout=_timeout(self.config, parameters), **fields
            )
            choice, usage = completion.choices[0], completion.usage
            text = choice.message.content or ""
            refused = bool(choice.message.refusal) or choice.finish_reason == "content_filter"
            problem = _problem(text, refused=refused, cut=choice.finish_reason == "length")
            tokens = (usage.prompt_tokens, usage.completion_tokens) if usage else (None, None)
            return Reply(prompt, _answer(text, problem), *tokens)

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens of texts by the package tiktoken.

        Raises:
          Failure: it is not installed, does not know the model, or cannot get its vocabulary.
        """
        try:
            import tiktoken

            encoding = tiktoken.encoding_for_model(self.model)
        except Exception as error:  # Its downloads fail in as many ways as there are networks.
            raise Failure("all", f"tiktoken cannot count tokens of {self.model}: {error}") from error
        return scaled_count(texts, lambda text: len(encoding.encode(text, disallowed_special=())))


def scaled_count(texts: Sequence[str], count: Callable[[str], int], sample: int = _COUNTED) -> int:
    """Tokens of all texts: counted for some that are spread over them, and scaled up by the number of characters."""
    chosen = texts[:: max(len(texts) // sample, 1)][:sample]
    characters = sum(map(len, chosen))
    counted = sum(map(count, chosen))
    return round(counted * sum(map(len, texts)) / characters) if characters else counted


@contextlib.contextmanager
def failures(sdk: ModuleType) -> Iterator[None]:
    """Raise a Failure for whatever an SDK raises, and for replies that are not of the protocol.

    Raises:
      Failure: with what follows from the error.
    """
    try:
        yield
    except sdk.APIStatusError as error:
        raise _of_status(error) from error
    except sdk.APITimeoutError as error:
        raise Failure("server", "the server did not reply in time") from error
    except sdk.APIConnectionError as error:
        names = {type(cause).__name__ for cause in _causes(error)}
        kind = "unreachable" if "ConnectError" in names else "server"
        told = next((str(cause) for cause in _causes(error) if cause is not error and str(cause)), str(error))
        raise Failure(kind, f"the connection failed: {told}") from error
    except (sdk.APIResponseValidationError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise Failure("nonsense", f"it sent a reply that is not of its protocol: {error!r}") from error


def _of_status(error: Any) -> Failure:
    """What a status says about this request and the others."""
    status, told = error.status_code, str(error)
    if status in _FOR_ALL:
        return Failure("all", f"{_FOR_ALL[status]}: {told}")
    if 400 <= status < 500 and any(sign in f"{told} {error.body}".lower() for sign in _OUT_OF_CREDIT):
        return Failure("all", f"the account has no credit: {told}")
    if status in _BUSY or status in (408, 409) or status >= 500:
        return Failure("busy" if status in _BUSY else "server", told, _retry_after(error.response.headers))
    return Failure("prompt", told)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _retry_after(headers: Any) -> float:
    """Seconds that a server asks to wait, by either header; 0 where it says nothing that can be read."""
    with contextlib.suppress(KeyError, ValueError):
        return max(float(headers["retry-after-ms"]) / 1000, 0.0)
    with contextlib.suppress(KeyError, ValueError):
        return max(float(headers["retry-after"]), 0.0)
    with contextlib.suppress(KeyError, ValueError, TypeError):
        return max(parsedate_to_datetime(headers["retry-after"]).timestamp() - time.time(), 0.0)
    return 0.0


def _problem(text: str, *, refused: bool, cut: bool) -> str:
    """Why a reply is no answer; empty where it is one."""
    if refused:
        return "the model refused to answer"
    if text.strip():
        return ""
    return "the answer is empty: the model spent all its tokens on thinking" if cut else "the answer is empty"


def _answer(text: str, problem: str) -> Answer:
    # Decoded tokens can hold half of a surrogate pair, which UTF-8 cannot.
    return Answer("" if problem else text.encode("utf-8", "replace").decode(), problem)


def _timeout(config: ChatConfig, parameters: Parameters) -> float:
    written = parameters.max_tokens + parameters.thinking_tokens
    return config.timeout or 60.0 + 0.1 * written


def _sdk(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{name}:MODEL needs the package {error.name}: pip install {name}",
            name=error.name,
        ) from error
