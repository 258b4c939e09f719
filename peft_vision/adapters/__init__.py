"""Methods that add trainable parameters and keep the function. One file per method."""
