"""The command line: our flags, how they are resolved, and what is refused."""
