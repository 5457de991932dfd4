"""From a checkpoint to a bundle: stage graphs, the parity gate and the manifest."""

from asag_deploy import _start as _start  # first of all: the rest takes a while to import
