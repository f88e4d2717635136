"""What passes between a chat model's back end and those who ask it: a request's parameters, replies and failures."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from typing import Literal, Protocol, runtime_checkable

from nla_jax.chat.config import THINKING_TOKENS


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a chat model said to a prompt."""

    text: str
    """The answer; empty where there is none."""
    problem: str = ""
    """Why there is no answer; empty where there is one."""


@dataclasses.dataclass(frozen=True)
class Parameters:
    """Everything that decides an answer beside the model and the prompt."""

    max_tokens: int
    """Most tokens of the answer."""
    instruction: str = ""
    """The system prompt; empty sends none."""
    temperature: float | None = None
    """None leaves it to an API's default, and takes a local model's likeliest tokens."""
    thinking_tokens: int = THINKING_TOKENS
    """Further tokens that an API model may spend on thinking."""

    @property
    def key(self) -> str:
        """The parameters but for the instruction as JSON; those that have their default are left out."""
        fields = {"max_tokens": self.max_tokens}
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.thinking_tokens != THINKING_TOKENS:
            fields["thinking_tokens"] = self.thinking_tokens
        return json.dumps(fields, sort_keys=True)


@dataclasses.dataclass(frozen=True)
class Reply:
    """One reply as it is kept: the answer with what it took."""

    prompt: str
    answer: Answer
    input_tokens: int | None = None
    """Tokens that were read, as the provider counts them; None where it does not say."""
    output_tokens: int | None = None
    """Tokens that were written, thoughts included; None where the provider does not say."""
    seconds: float | None = None
    """Time from sending the request to its reply."""
    batch: bool = False
    """Whether it came in a message batch, at the price of batches."""


FailureKind = Literal["prompt", "busy", "server", "nonsense", "unreachable", "all"]


class Failure(Exception):
    """A request that brought no reply, with what follows from it."""

    def __init__(self, kind: FailureKind, message: str, wait: float = 0.0):
        """Take the kind of failure, what happened, and the seconds that the server asks to wait.

        The kinds: "prompt", the server refuses this request, now and later; "busy", it has too many requests;
        "server", it is broken or stalls; "nonsense", its reply is not of its protocol; "unreachable", it cannot be
        connected to; "all", every further request would fail as well.
        """
        super().__init__(message)
        self.kind, self.wait = kind, wait


@runtime_checkable
class Allowance(Protocol):
    """Who decides whether a request may be paid for."""

    def may_send(self, under_way: int) -> bool:
        """Whether the budget allows another request while `under_way` are waited for."""


@runtime_checkable
class Backend(Protocol):
    """A chat model that is asked without any memory of earlier answers."""

    def __call__(
        self, prompts: Sequence[str], parameters: Parameters, allowance: Allowance
    ) -> Iterator[list[Reply]]:
        """Yield replies to different prompts as they arrive, those together that came at the same time.

        It ends early where the allowance lets nothing more be sent.

        Raises:
          RuntimeError: the model cannot be asked; the replies so far have been yielded.
        """
