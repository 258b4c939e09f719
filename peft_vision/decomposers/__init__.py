"""Methods that put a chain of smaller layers in the place of a layer. One file per method."""
