"""Write the HTML report of a run: `nla stage report`."""

import sys

from nla_jax.__main__ import main

if __name__ == "__main__":
    main(["stage", "report", *sys.argv[1:]])
