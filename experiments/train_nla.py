"""Train, measure and report an NLA: all stages in order."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(__doc__)
