"""Everything that takes an NVIDIA GPU, in one command, on a machine on which nothing can be installed."""
