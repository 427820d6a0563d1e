"""The command line: our flags, how we resolve them, and what we refuse."""
