"""Methods that remove heads, hidden units, branches or tokens. One file per method."""
