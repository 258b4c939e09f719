"""nn.Modules and layer rules that two or more methods use."""
