#!/usr/bin/env bash
# Check on this machine's GPUs what can be checked there: python -m sglang_shift.gpu_check.
#
# Uses $PYTHON, else python3, if that has SGLang and a PyTorch that finds a GPU. Otherwise it sets up .venv, which takes
# a network.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
if "$python" -c 'import sglang, torch; assert torch.version.cuda and torch.cuda.is_available()' 2>/dev/null; then
    export PYTHONPATH=$root/python:$root/kernels${PYTHONPATH:+:$PYTHONPATH}
else
    "$root/scripts/setup.sh" gpu-check
    python=$root/.venv/bin/python
fi
exec "$python" -m sglang_shift.gpu_check "$@"
