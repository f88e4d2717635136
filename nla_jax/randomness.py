"""Random keys by purpose."""

import jax


def key_for(seed: int, purpose: str) -> jax.Array:
    """The random key of one purpose, by its first four bytes: the order in which keys are asked for changes nothing."""
    number = int.from_bytes(purpose.encode()[:4].ljust(4, b"\0"), "little") & 0x7FFFFFFF
    return jax.random.fold_in(jax.random.key(seed), number)
