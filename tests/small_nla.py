"""An NLA of the tiny model without training, whose AV's answers always count as closed."""

import dataclasses

import jax
import numpy as np

from nla_jax.autoencoder.autoencoder import Autoencoder
from nla_jax.autoencoder.nla import NLA
from nla_jax.autoencoder.prompts import PromptTemplates, build_reconstructor_prompt, build_verbalizer_prompt
from nla_jax.autoencoder.reconstructor import Reconstructor
from nla_jax.autoencoder.verbalizer import InjectionConfig, Verbalizer
from nla_jax.autoencoder.yardstick import Yardstick
from nla_jax.lm.language_model import LanguageModel
from nla_jax.sharding.mesh import MeshConfig, make_mesh

LAYER, WIDTH = 1, 32
# As short as can be: among few tokens the activation counts.
TEMPLATES = PromptTemplates(
    verbalizer="V: {injection_char}",
    forced_start=":",
    closing="<|im_end|>",
    marker="<empty_output>",
    chat=False,
)


class AlwaysClosed(Autoencoder):
    """Reads whatever was sampled as a text, which an AV without training seldom closes."""

    def decode(self, tokens_BT, lengths_B, closed_B):
        return [self.tokenizer.decode(ids[:n]) for ids, n in zip(tokens_BT, lengths_B, strict=True)]


def small_autoencoder(lm: LanguageModel) -> Autoencoder:
    """Explanations of six tokens."""
    av_prompt = build_verbalizer_prompt(lm.tokenizer, TEMPLATES)
    ar_prompt = build_reconstructor_prompt(lm.tokenizer, TEMPLATES)
    untied = dataclasses.replace(lm.config, tie_embeddings=False)
    injection = InjectionConfig(layer=1, scale=60.0)
    verbalizer = Verbalizer(untied, av_prompt, injection, injection.scale)
    return AlwaysClosed(lm.tokenizer, verbalizer, Reconstructor(lm.config.truncated(LAYER), ar_prompt), 6, 24)


def small_nla(lm: LanguageModel, *, batch_size: int = 64) -> NLA:
    """With the yardstick of 50 random activations, and no judges."""
    autoencoder = small_autoencoder(lm)
    # Tied to the embedding, the head of a model without training repeats one token.
    head = 0.5 * jax.random.normal(jax.random.key(4), (WIDTH, lm.config.vocab_size))
    av_params = autoencoder.verbalizer.init({**lm.params, "lm_head": {"kernel": head}})
    ar_params = autoencoder.reconstructor.init(lm.params)
    # Not the identity, so that a head that is left out is noticed.
    ar_params["head"]["kernel"] = jax.random.normal(jax.random.key(5), (WIDTH, WIDTH))
    truncated = dataclasses.replace(lm, config=lm.config.truncated(LAYER))
    return NLA(
        name="small",
        autoencoder=autoencoder,
        av_params=av_params,
        ar_params=ar_params,
        layer=LAYER,
        mesh=make_mesh(MeshConfig(), jax.devices()[:1]),
        load_target=lambda whole: lm if whole else truncated,
        yardstick=Yardstick.of(random_activations(50, seed=1)),
        batch_size=batch_size,
    )


def random_activations(count: int, seed: int = 0) -> np.ndarray:
    """Rows about a common mean, as activations are."""
    draw = np.random.default_rng(seed)
    return (draw.standard_normal((count, WIDTH)) + np.linspace(-1, 1, WIDTH)).astype(np.float32)
