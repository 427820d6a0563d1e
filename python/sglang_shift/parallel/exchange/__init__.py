"""The all-to-all of a sequence-parallel step: tokens for heads, and back."""
