"""Warm-start the AR on the explanations; its last checkpoint is the frozen judge."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(__doc__, "ar_sft")
