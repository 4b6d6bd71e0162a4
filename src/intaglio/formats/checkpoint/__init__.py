"""Checkpoints of decoded weights for transformers. `kept`, the scales beside them, is shared by writer and readers."""
