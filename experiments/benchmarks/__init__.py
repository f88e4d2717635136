"""What experiments/benchmark.py measures, and the torch code that it measures against."""
