"""Measure the round trip and its controls on held-out documents."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(("evaluate",), __doc__)
