"""CUDA graphs of every mode: their sizes, their runners, and their replays."""
