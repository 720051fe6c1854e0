#!/usr/bin/env bash
# Run the fast tests on the oldest transformers that is supported, in an environment of its own (VENV, default
# .venv-oldest; same torch as the main one). Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=${VENV:-.venv-oldest} PINS="transformers==5.17.* huggingface-hub<2"
exec bash scripts/test.sh "$@"
