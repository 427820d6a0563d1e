"""Chooses the mode of each step: the policies, the selector that asks them, and the probes."""
