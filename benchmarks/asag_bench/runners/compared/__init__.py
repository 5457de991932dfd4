"""The detectors that the paper compares ASAG with: for speed, on a bundle's own backbone."""
