"""Timings of alternatives, measured in the same run."""
