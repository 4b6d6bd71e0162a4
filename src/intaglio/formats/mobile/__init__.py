"""The Gemma mobile format, written, compared, and read back into a packed model.

`layout` is shared by writers and readers.
"""
