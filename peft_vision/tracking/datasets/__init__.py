"""Readers of tracking data sets, one public layout per file; found by their stems."""
