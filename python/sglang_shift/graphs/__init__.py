"""CUDA graphs of both modes: which sizes are captured, by which runners, and which are replayed."""
