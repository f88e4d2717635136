"""The static half of an NLA: both models' descriptions with what turns texts into tokens and back."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int
from transformers import PreTrainedTokenizerBase

from nla_jax.autoencoder.prompts import decode_responses
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import Verbalizer
from nla_jax.data.batches import reconstructor_rows


@dataclasses.dataclass(frozen=True)
class Autoencoder:
    """How texts become AR prompts and sampled answers become texts."""

    tokenizer: PreTrainedTokenizerBase
    verbalizer: Verbalizer
    reconstructor: Reconstructor
    max_explanation_tokens: int
    max_reconstructor_tokens: int

    def decode(
        self,
        tokens_BT: Int[np.ndarray, "B T"],
        lengths_B: Int[np.ndarray, "B"],
        closed_B: Bool[np.ndarray, "B"],
    ) -> list[str | None]:
        """Texts of sampled answers, None where extraction fails."""
        return decode_responses(self.tokenizer, self.verbalizer.prompt, tokens_BT, lengths_B, closed_B)

    def encode(self, activations_BD: np.ndarray, texts: Sequence[str | None]) -> dict[str, np.ndarray]:
        """AR rows of texts."""
        prompt, length = self.reconstructor.prompt, self.max_reconstructor_tokens
        return dict(reconstructor_rows(activations_BD, texts, self.tokenizer, prompt, length))
