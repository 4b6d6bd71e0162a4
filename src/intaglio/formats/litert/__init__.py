"""Bundles for LiteRT-LM: `write` starts `converter`, and `read` imports neither.

`converter` imports LiteRT's packages; the other modules must not, since those are in another environment.
"""
