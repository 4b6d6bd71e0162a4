"""What runs in LiteRT's own environment, whose packages pin others than ours: started by `export.litert`."""

ERROR_MARK = "intaglio: "  # before a message for the user, among all that LiteRT's packages print
