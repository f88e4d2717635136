"""Corpora: what the documents of a run are read from, and how they are chosen, ordered and stored."""
