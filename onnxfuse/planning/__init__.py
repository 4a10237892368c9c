"""Which groups change, and to how many channels."""
