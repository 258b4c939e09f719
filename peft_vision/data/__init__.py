"""Where images and labels come from, and how an image becomes a tensor."""
