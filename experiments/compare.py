"""Compare evaluated runs, every figure that they share: `nla compare`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
