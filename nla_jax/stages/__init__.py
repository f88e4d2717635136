"""The stages of a run: what each does, and the order they run in."""
