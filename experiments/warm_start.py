"""Warm-start the AR and the AV on the explanations."""

from nla_jax.cli import main

if __name__ == "__main__":
    main(("ar_sft", "av_sft"), __doc__)
