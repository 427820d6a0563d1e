"""Holds the memory of a device as pages, which move between fixed addresses."""
