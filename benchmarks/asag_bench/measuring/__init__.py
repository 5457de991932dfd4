"""Measurements: plans, timings, accuracy and the machine."""
