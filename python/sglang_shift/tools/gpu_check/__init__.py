"""``python -m sglang_shift.gpu_check``: all that can be checked on the GPUs of this machine, in one command.

docs/gpu-check.md says what each check shows. This module stays light: every check is a process of its own.
"""
