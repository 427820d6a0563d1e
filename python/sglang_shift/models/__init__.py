"""Holds facts about model architectures: families, sizes, and fields of ``config.json``."""
