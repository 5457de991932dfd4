"""`asag-detect`: the command, its doctor, and its result files."""
