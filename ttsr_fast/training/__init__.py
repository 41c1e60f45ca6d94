"""Training of TTSR: what is learnt from, what is minimised, and the loop that does it."""
