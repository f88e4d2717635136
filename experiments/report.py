"""Write the HTML report of a run."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(__doc__, "report")
