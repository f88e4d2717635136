"""Train AV and AR jointly with GRPO."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(__doc__, "rl")
