"""Captures and replays the CUDA graphs of every mode."""
