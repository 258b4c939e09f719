"""Readouts: what takes the place of a classifier."""
