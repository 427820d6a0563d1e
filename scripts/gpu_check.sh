#!/usr/bin/env bash
# Run all checks that this machine's GPUs allow, with python -m sglang_shift.gpu_check.
#
# The script uses $PYTHON, or else python3, if this Python has SGLang, pytest and a PyTorch that finds a GPU.
# Otherwise the script says what is missing and sets up .venv, which needs a network and about 11 GB.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
needs='import pytest, sglang, torch
assert torch.version.cuda and torch.cuda.is_available(), "PyTorch finds no GPU"'
if missing=$("$python" -c "$needs" 2>&1); then
    export PYTHONPATH=$root/python:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
else
    echo "sglang_shift: $python cannot run the checks (${missing##*$'\n'}), so .venv runs them" >&2
    "$root/scripts/setup.sh" gpu-check
    python=$root/.venv/bin/python
fi
exec "$python" -m sglang_shift.gpu_check "$@"
