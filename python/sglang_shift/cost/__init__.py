"""Predicts how long a step takes: the cost model, its measurement and its file."""
