"""Decides which ranks serve together as one instance. Ranks merge into larger instances, and split again."""
