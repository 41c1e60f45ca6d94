"""Training of TTSR: losses, data, configuration and the loop around them."""
