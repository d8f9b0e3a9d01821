"""Timings of one training step: `make bench`, and experiment E7."""
