"""Train, measure and report an NLA, all stages in order: `nla train`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
