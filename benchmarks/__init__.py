"""Speed, as ratios of two things timed alternately in one run: ``python -m benchmarks --help``."""
