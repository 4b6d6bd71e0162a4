"""Codes in 32-bit words, for compressed-tensors (vLLM) and for MLX. `layout` is shared by writers and readers."""
