"""Samples as a pure function of (seed, split, step, row)."""
