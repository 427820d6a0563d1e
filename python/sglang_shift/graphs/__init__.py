"""CUDA graphs of every mode: which sizes are captured, by which runners, and which are replayed."""
