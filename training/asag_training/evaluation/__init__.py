"""Measuring a detector on a data set, be it a checkpoint or a bundle."""
