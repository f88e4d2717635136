"""Every family against transformers, in torch and float32: values, gradients, decoding, files."""

import copy
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from family_models import CONFIGS, VOCABULARY, WINDOW, build, decoder_layers
from safetensors.torch import load_file

from nla_jax.lm.attention import PAD_POSITION, KVSegment
from nla_jax.lm.files.configs import config_from_hf
from nla_jax.lm.files.safetensors_files import open_safetensors
from nla_jax.lm.files.weights import export_hf, load_params
from nla_jax.lm.logits import logits
from nla_jax.lm.transformer import Transformer, extend

B, T, PREFIX = 2, 14, 8
RNG = np.random.default_rng(0)
# Both rows begin alike, so that a prefix can be shared; it is longer than the window.
TOKENS = RNG.integers(0, VOCABULARY, (B, T))
TOKENS[1, :PREFIX] = TOKENS[0, :PREFIX]
PROBE = RNG.standard_normal((B, T, VOCABULARY)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A model here and there, and the directory it came from."""

    directory: object
    model: transformers.PreTrainedModel
    config: object
    params: dict


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    model = build(request.param)
    model.save_pretrained(directory)
    config = config_from_hf(json.loads((directory / "config.json").read_text()))
    return Pair(directory, model, config, load_params(open_safetensors(directory), config))


@pytest.fixture(scope="module")
def forward(pair):
    """Our residual streams, final-norm output, logits, and the gradients of a loss on the logits."""

    def loss(params):
        out = Transformer(pair.config).apply(
            {"params": params}, jnp.asarray(TOKENS), capture=tuple(range(pair.config.num_layers))
        )
        scores = logits(params, pair.config, out.final_BTD)
        return jnp.sum(scores * PROBE), (out, scores)

    return jax.jit(jax.grad(loss, has_aux=True))(pair.params)


def relative_error(actual, expected):
    """The worst position's ‖a − b‖ / ‖b‖."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return (np.linalg.norm(actual - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


def test_streams_logits_and_gradients(pair, forward, tmp_path):
    grads, (out, scores) = forward
    streams = []
    hooks = [
        layer.register_forward_hook(
            lambda module, inputs, output: streams.append(output[0] if isinstance(output, tuple) else output)
        )
        for layer in decoder_layers(pair.model)
    ]
    expected = pair.model(torch.tensor(TOKENS)).logits
    for hook in hooks:
        hook.remove()
    assert len(streams) == pair.config.num_layers
    for layer, stream in enumerate(streams):
        assert relative_error(out.resid[layer], stream.detach()) < 1e-4, f"layer {layer}"
    assert relative_error(scores, expected.detach()) < 1e-4

    # Gradients saved as if they were weights come back under our names and in our layout.
    (expected * torch.tensor(PROBE)).sum().backward()
    gradients = build_like(pair.model, {name: p.grad for name, p in pair.model.named_parameters()})
    pair.model.zero_grad()
    gradients.save_pretrained(tmp_path)

    wanted = load_params(open_safetensors(tmp_path), pair.config)
    # A bias of keys that are not rotated changes nothing: its gradient is zero but for rounding.
    floor = 1e-3 * np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(wanted)))

    def close(path, actual, expected):
        error = np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), floor)
        assert error < 1e-4, f"{jax.tree_util.keystr(path)}: {error:.1e}"

    jax.tree_util.tree_map_with_path(close, grads, wanted)


def build_like(model, values):
    """A model of the same kind with other values for its parameters."""
    other = transformers.AutoModelForCausalLM.from_config(model.config)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            parameter.copy_(values[name])
    return other


def test_decoding_after_a_shared_prefix_equals_the_forward(pair, forward):
    """The prefix runs once for both rows; the rest token by token, into buffers."""
    config, model, tokens = pair.config, Transformer(pair.config), jnp.asarray(TOKENS)
    if config.sliding_window:
        assert PREFIX > WINDOW == config.sliding_window

    def decode(params):
        prefix = model.apply({"params": params}, tokens[:1, :PREFIX])
        past = extend(None, prefix.segments)
        shape = (config.num_kv_heads, B, T - PREFIX, config.head_dim)
        unused = jnp.full((B, T - PREFIX), PAD_POSITION)
        empty = KVSegment(jnp.zeros(shape).swapaxes(2, 3), jnp.zeros(shape), unused)

        def step(buffers, t):
            now = jax.lax.dynamic_slice_in_dim(tokens, t, 1, axis=1)
            slots = [(buffer, t - PREFIX) for buffer in buffers]
            at = jnp.broadcast_to(t, (B, 1))
            out = model.apply({"params": params}, now, at, past=past, buffers=slots)
            return tuple(segment for (segment,) in out.segments), out.final_BTD[:, 0]

        _, final_TBD = jax.lax.scan(step, (empty,) * config.num_layers, jnp.arange(PREFIX, T))
        return prefix.final_BTD[0], final_TBD.swapaxes(0, 1)

    prefix_TD, rest_BTD = jax.jit(decode)(pair.params)
    expected = forward[1][0].final_BTD
    assert relative_error(prefix_TD, expected[0, :PREFIX]) < 1e-4
    assert relative_error(rest_BTD, expected[:, PREFIX:]) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip_is_bit_identical(pair, tmp_path, dtype):
    source = tmp_path / "source"
    copy.deepcopy(pair.model).to(getattr(torch, dtype)).save_pretrained(source)
    params = load_params(open_safetensors(source), pair.config)
    export_hf(params, pair.config, tmp_path / "export", dtype=dtype)
    original, exported = (load_file(d / "model.safetensors") for d in (source, tmp_path / "export"))
    assert original.keys() == exported.keys()
    for name, tensor in original.items():
        assert tensor.dtype == exported[name].dtype and torch.equal(tensor, exported[name]), name


def test_transformers_loads_the_export(pair, tmp_path):
    export_hf(pair.params, pair.config, tmp_path)
    assert config_from_hf(json.loads((tmp_path / "config.json").read_text())) == pair.config
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    # `layer_types` says what `max_window_layers` once meant.
    unread = {"_name_or_path": "", "max_window_layers": 0}
    ours, theirs = (
        transformers.AutoConfig.from_pretrained(d).to_dict() | unread for d in (tmp_path, pair.directory)
    )
    assert ours == theirs
    with torch.no_grad():
        ids = torch.tensor(TOKENS)
        torch.testing.assert_close(model(ids).logits, pair.model(ids).logits, rtol=0, atol=0)
