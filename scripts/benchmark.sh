#!/usr/bin/env bash
# Measure times and memory on the device at hand and write docs/results/benchmark_*: within 9 minutes on one GPU of the
# H200's class, a reduced set within 5 minutes on two CPU cores. Installs nothing and needs no network.
#   bash scripts/benchmark.sh                     with the project's environment, or python3 where there is none
#   PYTHON=python3 bash scripts/benchmark.sh      with any Python that has torch and transformers
#   bash scripts/benchmark.sh --minutes 3         less time: what does not fit is left out and named
#   bash scripts/benchmark.sh --help              every option
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=${VENV:-.venv}
python=${PYTHON:-}
if [ -z "$python" ]; then
  python=python3
  if [ -x "$venv/bin/python" ]; then python="$venv/bin/python"; fi
fi
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
exec "$python" -m dynamic_llava.profile benchmark "$@"
