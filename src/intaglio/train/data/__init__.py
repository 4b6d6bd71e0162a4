"""Documents out of what people have: files, folders, saved and named datasets; with a record of what was read.

Imports `packed` and below, and nothing else of `train` but `corpus`, for previews.
"""
