"""The search for a marker: a token that stands alone in the AV prompt and that ordinary text hardly holds."""

import re
from collections.abc import Callable, Iterator

from transformers import PreTrainedTokenizerBase

RESERVED = re.compile(r"unused|reserved|empty|placeholder|extra_id|control_\d", re.IGNORECASE)
"""Names of tokens that a model's makers kept for later, such as `<empty_output>` or `<unused0>`."""
RARE_SIGNS = "㊗㈎" + "".join(map(chr, range(0x3200, 0x3400)))
"""Enclosed and squared East Asian signs; the first two are those that published models use."""


def find_marker(tokenizer: PreTrainedTokenizerBase, fits: Callable[[str], bool]) -> str:
    """Find the marker that a prompt can use, the same one each time for a tokenizer and a prompt.

    The first that fits of: reserved tokens, in the order of their ids; the rare signs; any other token without
    ASCII characters and then any other token, the latest id first, since vocabularies end with what is rare.

    Args:
      tokenizer: whose tokens are tried.
      fits: whether a text is one token, found nowhere else, in the prompt.

    Raises:
      ValueError: no token fits.
    """
    for text in _candidates(tokenizer):
        if fits(text):
            return text
    raise ValueError(
        "no token of this tokenizer can be the marker: each one merges with the text around it or stands elsewhere "
        "in the prompt too; put blanks around {injection_char} in the verbalizer template, or set templates.marker"
    )


def _candidates(tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    added = {token_id: token.content for token_id, token in sorted(tokenizer.added_tokens_decoder.items())}
    in_use = set(tokenizer.special_tokens_map.values())
    yield from (text for text in added.values() if RESERVED.search(text) and text not in in_use)
    yield from RARE_SIGNS
    for without_ascii in (True, False):
        for token_id in range(len(tokenizer) - 1, -1, -1):
            text = "" if token_id in added else tokenizer.decode([token_id])
            # A token of half a character decodes to the replacement character.
            plain = text and "\ufffd" not in text and not any(map(str.isspace, text))
            if plain and not (without_ascii and any(map(str.isascii, text))):
                yield text
