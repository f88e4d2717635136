"""Plans of a run on devices that are not there: what fits, what bounds it, from ahead-of-time compilation."""
