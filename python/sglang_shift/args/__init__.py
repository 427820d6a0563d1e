"""Handles the command line: adds our flags, resolves their values, and refuses settings that we do not serve."""
