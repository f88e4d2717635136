"""The static half of an NLA: both models' descriptions, and what turns texts into tokens and back.

It has no weights, so training makes new ones for it round after round; `nla.NLA` is a trained one.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.prompts import decode_responses, encode_reconstructor
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """An AV, an AR and their tokenizer."""

    tokenizer: PreTrainedTokenizerBase
    verbalizer: Verbalizer | None
    """None where an AR is trained alone."""
    reconstructor: Reconstructor | None
    """None where an AV is used alone."""
    max_explanation_tokens: int
    """Longest AV answer, closing included; longer ones are cut and have failed."""
    max_reconstructor_tokens: int
    """Longest AR prompt after its shared prefix."""

    def decode(
        self,
        tokens_BT: Int[np.ndarray, "B T"],
        lengths_B: Int[np.ndarray, "B"],
        closed_B: Bool[np.ndarray, "B"],
    ) -> list[str | None]:
        """Texts of sampled answers, None where extraction fails."""
        return decode_responses(self.tokenizer, self.verbalizer.prompt, tokens_BT, lengths_B, closed_B)

    def encode(self, texts: Sequence[str | None]) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
        """AR prompts of texts without the shared prefix, and their lengths; a failed text (None) counts as empty."""
        prompt, length = self.reconstructor.prompt, self.max_reconstructor_tokens
        return encode_reconstructor(self.tokenizer, prompt, texts, length)
