"""The older place of `use_huge_pages`."""

from nla_jax.commands.startup import use_huge_pages as use_huge_pages
