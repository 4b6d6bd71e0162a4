"""Functions of tensors: grids, fits, rounding and the layout of codes in bytes.

They know no model and no file. Imports `errors` alone.
"""
