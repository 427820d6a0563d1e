#!/usr/bin/env bash
# Run the tests: the whole suite, or what the arguments (pytest's) say. Sets up what is missing.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" test
cd "$root"
exec .venv/bin/python -m pytest "$@"
