"""Exchanges tokens for heads, and heads for tokens, in the all-to-alls of an SP step."""
