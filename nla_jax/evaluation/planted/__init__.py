"""Planted material with a known answer: texts with a planted property, and cheaters that suites must find out."""
