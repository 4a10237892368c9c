"""What samples tell: how a network's channels behave, and the weights that fit a compressed network best."""
