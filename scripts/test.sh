#!/usr/bin/env bash
# Run the tests. Sets up what is missing.
#
#   scripts/test.sh              lint, types and the fast tier: at most 15 minutes on two cores
#   scripts/test.sh --all        lint, types and every test: at most 60 minutes on two cores
#   scripts/test.sh ARGUMENTS    what the arguments (pytest's) say: scripts/test.sh test/unit -k refusal
#
# Arguments of pytest may follow --all, too.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" test
cd "$root"

case ${1:-} in
    "") set -- -m "not full" ;;
    --all) shift ;;
    *) exec .venv/bin/python -m pytest "$@" ;;
esac
./scripts/lint.sh
exec .venv/bin/python -m pytest --durations=25 "$@"
