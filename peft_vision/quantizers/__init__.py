"""Methods that store weights in fewer bits. One file per method."""
