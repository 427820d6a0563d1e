#!/usr/bin/env bash
# Check on this machine's GPUs what can be checked there: python -m sglang_shift.gpu_check. Sets up what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh"
exec "$root/.venv/bin/python" -m sglang_shift.gpu_check "$@"
