"""Warm-start the AV on the explanations; its last checkpoint is the reference of RL."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(__doc__, "av_sft")
