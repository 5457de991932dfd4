"""Honest measurements: latency, memory and accuracy of bundles, each with the machine it was taken on."""

from asag_deploy import _start as _start  # first of all: the rest takes a while to import
