"""Random keys by purpose."""

import hashlib

import jax


def key_for(seed: int, purpose: str) -> jax.Array:
    """The random key of one purpose: a hash of its name decides it, so the order in which keys are asked for does not.

    Args:
      seed: the run's.
      purpose: any text; two uses of one seed must not share it.
    """
    digest = hashlib.blake2b(purpose.encode(), digest_size=4).digest()
    return jax.random.fold_in(jax.random.key(seed), int.from_bytes(digest, "little"))
