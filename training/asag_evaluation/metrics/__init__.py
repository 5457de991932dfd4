"""Metrics: average precision, miss rate, anchor quality."""
