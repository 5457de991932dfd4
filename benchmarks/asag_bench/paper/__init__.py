"""The paper's tables and figures, measured here on anybody's networks and data, beside its own numbers."""
