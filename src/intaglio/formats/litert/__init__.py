"""Bundles for LiteRT-LM: `write` starts `converter`, and `read` shares no code with either."""
