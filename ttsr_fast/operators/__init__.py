"""The operators of the namespace `ttsr_fast`: one file each, and a module for every backend."""
