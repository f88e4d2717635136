"""How far decoding is from the device's memory bandwidth, and training from its arithmetic."""

import functools
import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.measure import Comparison, alternate, finished
from benchmarks.rows import Step
from benchmarks.setting import Setting, obstacle
from nla_jax.lm.config import LMConfig
from nla_jax.lm.transformer import parameter_shapes
from nla_jax.training.supervised import ar_mse_step, av_sft_step


def limits(setting: Setting, side: Any) -> Iterator[Comparison]:
    """Decoding and both supervised steps against the device's measured peaks."""
    del side  # the device alone is the alternative
    yield from decoding(setting)
    if reason := obstacle("limits: training", setting):
        print(f"limits: training, {setting.dtype}: skipped, {reason}")
    else:
        yield from training(setting)


def decoding(setting: Setting) -> Iterator[Comparison]:
    """Bytes a second that decoding must read, over the measured bandwidth.

    The time of one token is the difference of a long and a short run, which both read the prompt, divided by the
    difference in tokens.
    """
    sizes, verbalizer = setting.sizes, setting.verbalizer
    params = verbalizer.init(setting.lm.params)
    long, short = sizes.new_tokens, max(sizes.new_tokens // 4, 1)
    copy, copied = fastest_copy(sizes.buffer_bytes)
    for count in sizes.activations[:2]:
        activations_ND = jnp.asarray(setting.activations(count))

        def writing(tokens: int, activations_ND: jax.Array = activations_ND) -> Callable[[], Any]:
            write = jax.jit(functools.partial(verbalizer.sample, group=sizes.group, max_tokens=tokens))
            return finished(write, params, activations_ND, jax.random.key(0))

        *times, copies = alternate(writing(long), writing(short), copy, repeats=setting.repeats)
        per_token = [(a - b) / (long - short) for a, b in zip(*times, strict=True)]
        mean_length = (long + short) / 2
        weights, cache = decode_bytes(setting, count, mean_length)
        yield Comparison(
            "limits: decode",
            setting.dtype,
            f"{count} x {sizes.group} answers, weights {weights / 1e6:.0f} MB + cache {cache / 1e6:.1f} MB",
            "memory bandwidth",
            "bytes/s",
            weights + cache,
            per_token,
            copies,
            their_amount=copied,
            notes={"long and short runs": times},
        )


def decode_bytes(setting: Setting, count: int, length: float) -> tuple[float, float]:
    """Bytes of weights and of cached keys and values that one token step has to read once."""
    config, sizes, prompt = setting.config, setting.sizes, setting.prompts[0]
    weights = matmul_weights(config) + config.d_model * config.vocab_size
    tokens = len(prompt.prefix) + count * (1 + len(prompt.tail)) + count * sizes.group * length
    per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return weights * config.compute_dtype.itemsize, tokens * per_token * config.cache_dtype.itemsize


def matmul_weights(config: LMConfig) -> int:
    """Number of block weights that multiply a token's residual stream; of routed experts, only the visited ones."""
    shapes = parameter_shapes(config)
    total = 0
    for path, shape in shapes.items():
        if not path.startswith("blocks_") or len(shape) < 2:
            continue
        routed = config.experts is not None and len(shape) == 3
        total += math.prod(shape) * (config.experts.per_token / config.experts.count if routed else 1)
    return int(total)


def training(setting: Setting) -> Iterator[Comparison]:
    """FLOPs a second that a step needs, over the measured peak; logits that are recomputed count once."""
    sizes, (av, ar) = setting.sizes, setting.prompts
    peak, peak_flops = fastest_matmul(setting)
    verbalizer, reconstructor, masters = setting.verbalizer, setting.reconstructor, setting.master_params
    head = setting.config.d_model * setting.config.vocab_size
    answer, rows = sizes.response_tokens, sizes.batch
    # Each token once: the prefix, every row's marker and tail, every answer but its last token.
    av_tokens = len(av.prefix) + rows * (len(av.tail) + answer)
    ar_tokens = len(ar.prefix) + rows * (sizes.reconstructor_tokens - len(ar.prefix))
    av_pairs = rows * _visible(len(av.tail) + answer, len(av.prefix))
    ar_pairs = rows * _visible(sizes.reconstructor_tokens - len(ar.prefix), len(ar.prefix))
    cases = (
        (
            "ar_step",
            training_flops(reconstructor.config, ar_tokens, ar_pairs),
            lambda: Step(
                ar_mse_step,
                reconstructor.init(masters),
                setting.reconstructor_batch(),
                reconstructor=reconstructor,
            ),
        ),
        (
            "av_step",
            training_flops(setting.config, av_tokens, av_pairs) + 6 * head * rows * answer,
            lambda: Step(
                av_sft_step, verbalizer.init(masters), setting.verbalizer_batch(), verbalizer=verbalizer
            ),
        ),
    )
    for name, flops, make in cases:
        times = alternate(make(), peak, repeats=setting.repeats)
        yield Comparison(
            f"limits: {name}",
            setting.dtype,
            f"batch {rows}, {flops / 1e9:.0f} GFLOP",
            "matmul peak",
            "FLOP/s",
            flops,
            *times,
            their_amount=peak_flops,
        )


def _visible(own: int, before: int) -> float:
    """Query-key pairs of a row's own tokens, which see `before` shared ones and each other causally."""
    return own * before + own * (own + 1) / 2


def training_flops(config: LMConfig, tokens: float, pairs: float) -> float:
    """FLOPs of forward and backward: 6 a weight and token, 12 a query-key pair, head and head dimension."""
    attention = 12 * config.num_layers * config.num_heads * config.head_dim * pairs
    return 6 * matmul_weights(config) * tokens + attention


def fastest_copy(size: int) -> tuple[Callable[[], Any], float]:
    """The faster of two plain passes over memory, a copy and a sum, with the bytes that it moves."""
    buffer = jnp.ones((size // 4 // 1024, 1024), jnp.float32)
    passes = (
        (finished(jax.jit(lambda x: x + 1), buffer), 2.0 * size),
        (finished(jax.jit(lambda x: x.sum(axis=1)), buffer), float(size)),
    )
    timed = [(statistics.median(alternate(run, repeats=3)[0]) / moved, run, moved) for run, moved in passes]
    _, run, moved = min(timed, key=lambda item: item[0])
    return run, moved


def fastest_matmul(setting: Setting) -> tuple[Callable[[], Any], float]:
    """A product of square matrices with the setting's operands and float32 results, and its arithmetic."""
    side = setting.sizes.matmul_size * (1 if jax.default_backend() == "cpu" else 4)
    operand = jnp.ones((side, side), setting.config.compute_dtype)
    product = jax.jit(lambda a, b: jnp.einsum("mi,io->mo", a, b, preferred_element_type=jnp.float32))
    return finished(product, operand, operand), 2.0 * side**3
