"""The front of accuracy against time: light ASAG at every stop, beside peers trained on the same budget."""
