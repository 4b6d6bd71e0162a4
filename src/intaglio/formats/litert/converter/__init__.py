"""Runs in LiteRT's own environment, whose packages pin others than ours; started by `formats.litert.write`.

Imports `packed` and below.
"""

ERROR_MARK = "intaglio: "  # before a message for the user, among all that LiteRT's packages print
