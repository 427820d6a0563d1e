"""``python -m sglang_shift.plan`` predicts how a model runs on GPUs that are not there, from published figures.

docs/cost-model.md gives the source of each figure. It says how step times follow from the figures, and how far they are
off.
"""
