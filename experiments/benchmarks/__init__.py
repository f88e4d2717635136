"""The measurements of experiments/benchmark.py, and the torch code that they compare with."""
