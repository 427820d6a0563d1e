#!/usr/bin/env bash
# Run all checks that this machine's GPUs allow, with python -m sglang_shift.gpu_check.
#
# The script uses $PYTHON, or else python3, if this Python has SGLang, pytest and a PyTorch that finds a GPU.
# Otherwise the script sets up .venv, which needs a network.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if "$python" -c 'import pytest, sglang, torch; assert torch.version.cuda and torch.cuda.is_available()' 2>/dev/null; then
    export PYTHONPATH=$root/python:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
else
    "$root/scripts/setup.sh" gpu-check
    python=$root/.venv/bin/python
fi
exec "$python" -m sglang_shift.gpu_check "$@"
