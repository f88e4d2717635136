"""The two prompts of an NLA as static token pieces.

Every AV prompt is the same tokens except for one injected vector, so it is `prefix | marker | tail`, found once from
the tokenizer. Nothing is searched at run time: an explanation that happens to write the marker is plain text.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from transformers import PreTrainedTokenizerBase

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
    marker: str = "<empty_output>"
    """The token whose vector is replaced by the activation; it must be one token in context."""

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

    Raises:
      ValueError: the marker is not exactly one token in the rendered prompt, or the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; use an instruction-tuned model's tokenizer")
    message = templates.verbalizer.replace(INJECTION_SLOT, templates.marker)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": message}],
        add_generation_prompt=True,
        tokenize=False,
        enable_thinking=False,
    )
    # The chat template has written any BOS already; encoding adds no second one.
    encoded = tokenizer(text + templates.forced_start, add_special_tokens=False, return_offsets_mapping=True)
    ids, start = encoded["input_ids"], text.index(templates.marker)
    span = (start, start + len(templates.marker))
    slots = [i for i, offset in enumerate(encoded["offset_mapping"]) if tuple(offset) == span]
    if len(slots) != 1:
        pieces = [
            tokenizer.decode([i])
            for i, (a, b) in zip(ids, encoded["offset_mapping"], strict=True)
            if a < span[1] and b > span[0]
        ]
        raise ValueError(
            f"the marker {templates.marker!r} is not one token in context: it becomes {pieces}; "
            "choose a single token, for instance an unused special token of this tokenizer"
        )
    slot = slots[0]
    closing = tokenizer.encode(templates.closing, add_special_tokens=False)
    return VerbalizerPrompt(
        tuple(ids[:slot]), ids[slot], tuple(ids[slot + 1 :]), tuple(closing), tokenizer.eos_token_id
    )


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
        whole = prompt.template.replace(EXPLANATION_SLOT, text or "")
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


def pad(rows: Sequence[Sequence[int]], length: int) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Right-pad rows with 0 to `length`; masks come from the lengths, since 0 may be a real id."""
    padded = np.zeros((len(rows), length), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    return padded, np.array([len(ids) for ids in rows], np.int32)
