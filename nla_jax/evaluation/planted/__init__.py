"""Planted material with a known answer: properties of texts to be told, and cheaters to be found out."""
