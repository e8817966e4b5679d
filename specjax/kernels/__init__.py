"""Pallas kernels for TPU, for steps where XLA's code takes longer than moving the step's bytes; cache.py chooses."""
