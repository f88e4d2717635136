"""Look at data sets, bring your own, share them, and estimate what texts will cost: `nla data`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["data", *sys.argv[1:]])
