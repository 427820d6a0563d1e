"""``python -m sglang_shift.plan``: what a model would take on GPUs that are not there, from published figures.

docs/cost-model.md says where each figure is from, how step times follow from them, and how far they are off.
"""
