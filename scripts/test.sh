#!/usr/bin/env bash
# Run the tests, and set up what is missing.
#
#   scripts/test.sh              runs lint, types and the fast tier, in at most 15 minutes on two cores
#   scripts/test.sh --all        runs lint, types and every test, in about 75 minutes on two cores, or more if they are slow
#   scripts/test.sh ARGUMENTS    runs pytest with these arguments, for example: scripts/test.sh test/unit -k refusal
#
# Arguments of pytest may also follow --all.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" test
cd "$root"

only=()
case ${1:-} in
    "") only=(-m "not full") ;;
    --all) shift ;;
    *) exec .venv/bin/python -m pytest "$@" ;;
esac
./scripts/lint.sh
# Tests without a server share the cores, a module in each. The modules that take long come first, so that no core is
# idle at the end. Tests of servers run one after the other.
code=0
cores=(-n logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder)
.venv/bin/python -m pytest --durations=25 "${cores[@]}" "${only[@]}" "$@" test/ranks test/unit test/tools || code=$?
.venv/bin/python -m pytest --durations=25 "${only[@]}" "$@" test/server || code=$?
exit "$code"
