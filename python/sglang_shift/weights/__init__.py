"""One copy of the weights that serves both modes, and the linear layers that read it."""
