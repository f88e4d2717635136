"""Show what the checkpoints of a run hold, and check that it can be read: `nla inspect`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["inspect", *sys.argv[1:]])
