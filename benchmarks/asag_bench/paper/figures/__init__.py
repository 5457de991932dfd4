"""The paper's figures, each drawn from what was given."""
