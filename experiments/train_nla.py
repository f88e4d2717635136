"""Train, measure and report an NLA: all stages in order."""

from nla_jax.cli import main
from nla_jax.config import STAGES

if __name__ == "__main__":
    main(tuple(STAGES), __doc__)
