"""The operators of the namespace `ttsr_fast` and the backends that run them."""
