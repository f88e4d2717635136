"""Texts with a planted property, for asking whether an explanation tells it.

Every task is built from templates with many fillers, so that nothing is downloaded and no text is seen twice. No
template is one that warm-start texts or prompts of the corpus are made from. The number of sentences is drawn, so that
the length of a text hardly tells its label. The texts that teach a probe share no filler with those that are asked
about.
"""

from transformers import PreTrainedTokenizerBase

from nla_jax.evaluation.planted import closing_tasks, request_tasks, sentence_tasks
from nla_jax.evaluation.planted.task import Task


def tasks(tokenizer: PreTrainedTokenizerBase | None = None) -> list[Task]:
    """All planted tasks: those read after a shared closing, at the ends of sentences, and in chats.

    Args:
      tokenizer: the target's, whose chat template writes the chats; without one, or without a template, the tasks that
        are read in chats are left out.
    """
    found = [*closing_tasks.tasks(), *sentence_tasks.tasks()]
    if tokenizer is not None and tokenizer.chat_template is not None:
        found += request_tasks.tasks(tokenizer)
    return found
