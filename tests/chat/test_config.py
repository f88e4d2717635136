import pytest

from nla_jax.chat.config import ChatConfig


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"model": "gpt"}, "the chat model 'gpt' is not PROVIDER:MODEL"),
        ({"budget": 0.0}, "the budget is 0.0; expected US dollars above 0"),
        ({"budget": float("nan")}, "the budget is nan"),
        ({"timeout": 0.0}, "the time-out is 0.0; expected seconds above 0"),
        ({"concurrency": 0}, "the concurrency is 0; expected 1 request"),
        ({"thinking_tokens": -1}, "thinking_tokens is -1; expected 0 or more"),
        ({"model": "openai:m", "batch": True}, "only anthropic:MODEL has message batches"),
    ],
)
def test_what_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ChatConfig(**fields)
