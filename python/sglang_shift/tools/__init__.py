"""Holds the commands beside the server, each in a file or a folder, and the modules that several commands use."""
