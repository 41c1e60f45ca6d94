"""Training of TTSR: data, networks, losses, and the loop over epochs and batches."""
