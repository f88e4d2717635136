"""The two prompts of an NLA as static token pieces.

Every AV prompt is the same tokens except for one injected vector, so it is `prefix | marker | tail`, found once from
the tokenizer. Nothing is searched at run time: an explanation that happens to write the marker is plain text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.markers import find_marker
from nla_jax.lm.chat_template import PLACEHOLDER, end_token, render_chat
from nla_jax.lm.prompt_batches import pad
from nla_jax.lm.tokenized import as_unicode

EXPLANATION_SLOT = "{explanation}"
INJECTION_SLOT = "{injection_char}"


@dataclasses.dataclass(frozen=True)
class PromptTemplates:
    """The texts of both prompts; part of the run's config and of every data set's sidecar."""

    verbalizer: str = (
        "A vector was read from a language model at the last word of some text. Say what the text is about, "
        "how it ends and what comes next. Vector: {injection_char}"
    )
    """User message of the AV; `{injection_char}` is where the marker goes. What stands before it is computed
    once for all activations, what follows once for each: keep the marker late."""
    forced_start: str = "<explanation>\n"
    """Opening of every AV answer; it belongs to the prompt, so no sampled token is spent on it."""
    closing: str = "\n</explanation>"
    """What completes an explanation; an answer without it has failed. One special token is cheapest."""
    reconstructor: str = "A text: {explanation}\nText:"
    """Plain-text AR prompt, read at its last token; `{explanation}` is where the explanation goes."""
    marker: str | None = None
    """The token whose vector is replaced by the activation. Any token can be, if it is one token in context; None
    takes one that the tokenizer has to spare (see `markers.find_marker`), and sidecars record which."""
    chat: bool = True
    """Whether the verbalizer template is a user message in the tokenizer's chat template. False is for base
    models, which have none: then the template, a line break and the forced start are the whole AV prompt, after
    a BOS where the tokenizer adds one."""

    def __post_init__(self):
        for name, slot in (("verbalizer", INJECTION_SLOT), ("reconstructor", EXPLANATION_SLOT)):
            if getattr(self, name).count(slot) != 1:
                raise ValueError(
                    f"the {name} template must contain {slot} exactly once, got {getattr(self, name)!r}; "
                    f"put {slot} where the {'marker' if name == 'verbalizer' else 'explanation'} belongs"
                )


@dataclasses.dataclass(frozen=True)
class VerbalizerPrompt:
    """Token ids of the AV prompt; hashable, so jitted functions take it as a static argument."""

    prefix: tuple[int, ...]
    marker: int
    tail: tuple[int, ...]
    """Tokens after the marker, up to and including the forced start."""
    closing: tuple[int, ...]
    end_token: int
    """The model's own end-of-turn token."""
    marker_text: str
    """What the marker token spells."""

    @property
    def length(self) -> int:
        """Tokens before the first sampled one."""
        return len(self.prefix) + 1 + len(self.tail)


@dataclasses.dataclass(frozen=True)
class ReconstructorPrompt:
    """Static pieces of the AR prompt: every encoded prompt starts with `prefix`."""

    template: str
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    """Tokens after the explanation; the first of them may merge with the explanation's last token."""


def build_verbalizer_prompt(
    tokenizer: PreTrainedTokenizerBase, templates: PromptTemplates
) -> VerbalizerPrompt:
    """Render the AV prompt once (one user turn, generation prompt, forced start) and split it at the marker.

    Where a chat template writes a BOS it is the only one; one that writes none gets none, as `transformers` does.

    Raises:
      ValueError: the marker is not exactly one token in the rendered prompt, or nothing stands before it; no
        chat template although `templates.chat`, or one that refuses or changes the message; no end token.
    """
    message = templates.verbalizer.replace(INJECTION_SLOT, PLACEHOLDER)
    try:
        text = render_chat(tokenizer, message) if templates.chat else f"{message}\n"
    except ValueError as error:
        raise ValueError(
            f"{error}. For a base model set templates.chat to False, which makes the verbalizer template the whole "
            "prompt"
        ) from error
    if text.count(PLACEHOLDER) != 1:
        raise ValueError(
            f"the chat template repeats or drops the user message: it renders {message!r} as {text!r}; "
            "set templates.chat to False to do without it"
        )
    before, after = (text + templates.forced_start).split(PLACEHOLDER)
    start = [] if templates.chat else _bos(tokenizer)

    def split(marker: str) -> tuple[list[int], int | None, list[str]]:
        """All ids, where the marker is among them if it is one token, and the tokens that hold a part of it."""
        encoded = tokenizer(before + marker + after, add_special_tokens=False, return_offsets_mapping=True)
        span = (len(before), len(before) + len(marker))
        held = [i for i, (a, b) in enumerate(encoded["offset_mapping"]) if a < span[1] and b > span[0]]
        ids, pieces = encoded["input_ids"], [tokenizer.decode([encoded["input_ids"][i]]) for i in held]
        # Some tokenizers leave the space in a token out of its offsets, so the token's own text counts as well.
        alone = pieces == [marker] and tuple(encoded["offset_mapping"][held[0]]) == span
        return start + ids, len(start) + held[0] if alone else None, pieces

    def fits(marker: str) -> bool:
        ids, slot, _ = split(marker)
        return slot is not None and ids.count(ids[slot]) == 1

    marker = find_marker(tokenizer, fits) if templates.marker is None else templates.marker
    ids, slot, pieces = split(marker)
    if slot is None:
        raise ValueError(
            f"the marker {marker!r} is not one token in context: it becomes {pieces}; choose a single token, for "
            "instance an unused special token of this tokenizer, or leave templates.marker unset to have one found"
        )
    if slot == 0:
        raise ValueError(
            f"the AV prompt starts with the marker {marker!r}; write some words before {INJECTION_SLOT} in the "
            "verbalizer template"
        )
    return VerbalizerPrompt(
        prefix=tuple(ids[:slot]),
        marker=ids[slot],
        tail=tuple(ids[slot + 1 :]),
        closing=tuple(tokenizer.encode(templates.closing, add_special_tokens=False)),
        end_token=end_token(tokenizer, chat=templates.chat),
        marker_text=marker,
    )


def _bos(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS that the tokenizer puts before plain text, if it does."""
    first = tokenizer.encode("")[:1]
    return first if first == [tokenizer.bos_token_id] else []


def build_reconstructor_prompt(
    tokenizer: PreTrainedTokenizerBase, templates: PromptTemplates
) -> ReconstructorPrompt:
    """Find the tokens that every AR prompt starts and ends with, by encoding it around unlike explanations."""
    probes = ("a", "The", "7", "(", '"', "\n", " x", "é", "»")
    encoded = [tokenizer.encode(templates.reconstructor.replace(EXPLANATION_SLOT, probe)) for probe in probes]
    return ReconstructorPrompt(
        templates.reconstructor, _common_start(encoded), _common_start([ids[::-1] for ids in encoded])[::-1]
    )


def _common_start(sequences: Sequence[Sequence[int]]) -> tuple[int, ...]:
    length = 0
    while all(len(ids) > length + 1 for ids in sequences) and len({ids[length] for ids in sequences}) == 1:
        length += 1
    return tuple(sequences[0][:length])


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, prompt: VerbalizerPrompt, explanations: Sequence[str], max_tokens: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Encode explanations as AV answers, closing included, cut at `max_tokens` and padded with 0.

    Returns:
      ids and lengths; a cut answer lacks its closing, as a cut sample would.
    """
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in explanations]
    return pad([[*ids, *prompt.closing][:max_tokens] for ids in encoded], max_tokens)


def decode_responses(
    tokenizer: PreTrainedTokenizerBase,
    prompt: VerbalizerPrompt,
    tokens_BT: Int[np.ndarray, "B T"],
    lengths_B: Int[np.ndarray, "B"],
    closed_B: np.ndarray,
) -> list[str | None]:
    """Decode sampled answers; None where extraction fails (never closed, or empty)."""
    bodies = [ids[: max(n - len(prompt.closing), 0)] for ids, n in zip(tokens_BT, lengths_B, strict=True)]
    texts = tokenizer.batch_decode(bodies, skip_special_tokens=False)
    return [
        text.strip() if closed and text.strip() else None
        for text, closed in zip(texts, closed_B, strict=True)
    ]


def encode_reconstructor(
    tokenizer: PreTrainedTokenizerBase,
    prompt: ReconstructorPrompt,
    explanations: Sequence[str | None],
    max_tokens: int,
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Encode AR prompts without their shared prefix, padded with 0; a failed explanation (None) counts as empty.

    An explanation too long for `max_tokens` loses its end, never the template's suffix: the AR reads there.

    Raises:
      ValueError: `max_tokens` has no room beside the suffix.
    """
    if max_tokens <= len(prompt.suffix):
        raise ValueError(
            f"max_reconstructor_tokens={max_tokens} leaves no room for an explanation: the template's suffix alone "
            f"takes {len(prompt.suffix)} tokens; raise the limit"
        )
    prefix_text = tokenizer.decode(list(prompt.prefix), skip_special_tokens=True)
    rows = []
    for text in explanations:
        whole = prompt.template.replace(EXPLANATION_SLOT, as_unicode(text or ""))
        ids = tokenizer.encode(whole)
        if tuple(ids[: len(prompt.prefix)]) == prompt.prefix:
            ids = ids[len(prompt.prefix) :]
        else:
            # The explanation's first characters merged into the prefix: encode what follows it apart.
            ids = tokenizer.encode(whole[len(prefix_text) :], add_special_tokens=False)
        if len(ids) > max_tokens:
            ids = ids[: max_tokens - len(prompt.suffix)] + list(prompt.suffix)
        rows.append(ids)
    return pad(rows, max_tokens)
