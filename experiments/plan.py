"""What a run takes on devices that are not there: `nla plan`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["plan", *sys.argv[1:]])
