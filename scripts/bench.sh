#!/usr/bin/env bash
# Measure Shift Parallelism beside stock SGLang with python -m sglang_shift.benchmark, and set up what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" benchmark
exec "$root/.venv/bin/python" -m sglang_shift.benchmark "$@"
