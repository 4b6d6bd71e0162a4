"""A folder for each format, `table` and `verify` over all of them, and helpers that several share.

Imports `packed` and below, never `train`. Modules that read import none that write.
"""
