"""``python -m sglang_shift.gpu_check`` runs all checks that this machine's GPUs allow, in one command.

docs/gpu-check.md says what each check shows. This module imports little, because every check runs in its own process.
"""
