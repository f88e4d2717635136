"""Train AV and AR jointly with GRPO: `nla stage rl`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["stage", "rl", *sys.argv[1:]])
