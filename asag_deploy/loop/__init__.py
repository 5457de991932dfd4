"""The probing loop: the stages it runs, its decisions, and the trace it leaves."""
