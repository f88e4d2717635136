"""Fused attention kernels for queries and keys of the same tokens: cuDNN's on GPUs, splash attention on TPUs.

Both compute what `attend` computes where the queries' own tokens are the only segment, without ever holding the scores.
They hide keys by index, where `attend` goes by position: the two agree for consecutive positions with padding at the
end. Neither kernel differentiates through its log-sum-exp, so partial results over several segments cannot be merged
exactly; `attend` keeps shared segments on XLA.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

IMPLEMENTATIONS = {"xla": ("cpu", "gpu", "tpu"), "cudnn": ("gpu",), "splash": ("tpu", "cpu")}
"""Implementation -> the platforms that it runs on. On CPU, splash runs in Pallas' interpreter, for tests."""
_BLOCK = 128
"""Tile of splash attention, in queries and in keys; shorter texts are padded to it."""
_CUDNN_HEAD_DIM = 256


def check_implementation(
    implementation: str,
    *,
    head_dim: int,
    dtype: jnp.dtype,
    softcap: float | None = None,
    platform: str | None = None,
) -> None:
    """Refuse what a kernel cannot compute.

    Args:
      implementation: key of IMPLEMENTATIONS.
      head_dim: width of queries, keys and values.
      dtype: operand dtype.
      softcap: soft cap of the scores, None for none.
      platform: "cpu", "gpu" or "tpu"; None leaves it unchecked.

    Raises:
      ValueError: an unknown implementation, or a value that it does not take.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention={implementation!r} is unknown; use one of {', '.join(IMPLEMENTATIONS)}")
    platforms = IMPLEMENTATIONS[implementation]
    if platform is not None and platform not in platforms:
        raise ValueError(
            f"attention={implementation!r} runs on {' or '.join(platforms)}, not on the {platform} devices of "
            "this run; set model.attention to 'xla'"
        )
    if implementation != "cudnn":
        return
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise ValueError(
            f"attention='cudnn' takes bfloat16 or float16 operands, not {jnp.dtype(dtype).name}; "
            "set model.attention_dtype to 'bfloat16', or model.attention to 'xla'"
        )
    if head_dim > _CUDNN_HEAD_DIM or head_dim % 8:
        raise ValueError(
            f"attention='cudnn' takes head dimensions that are multiples of 8 up to 128, up to {_CUDNN_HEAD_DIM} "
            f"from Hopper on, not {head_dim}; set model.attention to 'xla'"
        )
    if softcap is not None:
        raise ValueError(
            f"attention='cudnn' has no soft cap of scores (this model's is {softcap}); "
            "set model.attention to 'xla'"
        )


def attend_itself(
    implementation: str,
    query_BTHD: Float[Array, "B T H Dh"],
    keys_BKTD: Float[Array, "B K T Dh"],
    values_BKTD: Float[Array, "B K T Dh"],
    dtype: jnp.dtype,
    *,
    scale: float,
    window: int | Int[Array, ""] | None,
    softcap: float | None,
) -> Float[Array, "B T H Dh"]:
    """Causal attention of tokens to themselves by a kernel; query t sees the keys 0..t, or the last `window` of them.

    Args:
      implementation: "cudnn" or "splash".
      query_BTHD: rotated queries, unscaled.
      keys_BKTD: rotated keys.
      values_BKTD: values.
      dtype: operand dtype; the softmax is in float32, the result of a kernel in `dtype`.
      scale: factor of the scores.
      window: keys at this distance and farther are hidden.
      softcap: scaled scores s become softcap * tanh(s / softcap).

    Raises:
      ValueError: see `check_implementation`; or a window that is not known when the program is compiled.
    """
    check_implementation(implementation, head_dim=query_BTHD.shape[-1], dtype=dtype, softcap=softcap)
    if not isinstance(window, int | None):
        raise ValueError(
            f"attention={implementation!r} needs sliding windows that are known at compile time, not {window}: "
            "blocks that slide cannot be scanned together with blocks that do not; set model.attention to 'xla'"
        )
    query, keys, values = (x.astype(dtype) for x in (query_BTHD, keys_BKTD, values_BKTD))
    if implementation == "cudnn":
        out_BTHD = jax.nn.dot_product_attention(
            query,
            keys.swapaxes(1, 2),
            values.swapaxes(1, 2),
            scale=scale,
            is_causal=True,
            local_window_size=None if window is None else (window - 1, 0),
            implementation="cudnn",
        )
    else:
        # Scaled before it is rounded, as the XLA implementation does.
        scaled_BHTD = (query_BTHD * scale).astype(dtype).swapaxes(1, 2)
        out_BTHD = _splash(scaled_BHTD, keys, values, window, softcap).swapaxes(1, 2)
    return out_BTHD.astype(query_BTHD.dtype)


def _splash(
    query_BHTD: Array, keys_BKTD: Array, values_BKTD: Array, window: int | None, softcap: float | None
) -> Array:
    T = query_BHTD.shape[2]
    padding = [(0, 0), (0, 0), (0, -T % _BLOCK), (0, 0)]
    padded = [jnp.pad(x, padding) for x in (query_BHTD, keys_BKTD, values_BKTD)]
    kernels = {
        platform: _over_devices(_splash_kernel(T + -T % _BLOCK, query_BHTD.shape[1], window, softcap, cpu))
        for platform, cpu in (("cpu", True), ("tpu", False))
    }
    return jax.lax.platform_dependent(*padded, **kernels)[:, :, :T]


def _splash_kernel(
    length: int, heads: int, window: int | None, softcap: float | None, interpret: bool
) -> Callable[..., Array]:
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    shape = (length, length)
    mask = masks.CausalMask(shape) if window is None else masks.LocalMask(shape, (window - 1, 0), 0)

    def kernel(query_BHTD: Array, keys_BKTD: Array, values_BKTD: Array) -> Array:
        # The device's own heads: fewer than the model's where they are split over devices.
        local = masks.MultiHeadMask([mask] * query_BHTD.shape[1])
        attention = splash.make_splash_mha(
            local,
            head_shards=1,
            q_seq_shards=1,
            attn_logits_soft_cap=softcap,
            interpret=interpret,
        )
        return jax.vmap(attention)(query_BHTD, keys_BKTD, values_BKTD)

    return kernel


def _over_devices(kernel: Callable[..., Array]) -> Callable[..., Array]:
    """Split rows over the data and fsdp axes and heads over the tensor axis of the mesh that `jax.set_mesh` set.

    The partitioner cannot look into a kernel. Where an axis does not divide rows or heads, each of its devices computes
    all of them.
    """

    def split(*arrays: Array) -> Array:
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty or mesh.size == 1:
            return kernel(*arrays)

        def spec(x: Array) -> P:
            rows = mesh.shape["data"] * mesh.shape["fsdp"]
            kv_heads = arrays[1].shape[1]
            return P(
                ("data", "fsdp") if x.shape[0] % rows == 0 else None,
                "tensor" if kv_heads % mesh.shape["tensor"] == 0 else None,
            )

        specs = tuple(spec(x) for x in arrays)
        run = functools.partial(jax.shard_map, in_specs=specs, out_specs=specs[0], check_vma=False)
        return run(kernel)(*arrays)

    return split
