"""Checkpoints of decoded weights for transformers, and the scales that are `kept` beside them."""
