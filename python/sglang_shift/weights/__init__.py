"""Keeps one copy of the weights for both modes, and has the linear layers that read it."""
