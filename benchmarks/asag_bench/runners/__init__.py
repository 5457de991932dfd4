"""Runners: everything that can be timed, and the references beside it."""
