"""Honest measurements: latency, memory and accuracy of bundles, each with the machine it was taken on."""
