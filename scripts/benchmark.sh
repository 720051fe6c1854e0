#!/usr/bin/env bash
# Measure what the device at hand can show: 540 seconds on one GPU, most telling first, or a reduced set within 6 minutes
# on two CPU cores. Each part is a process of its own with its own time; a result is on the disk the moment it exists.
# Four files come back in the output folder: results.jsonl, log.txt, summary.md, summary.json. Needs torch and
# transformers, installs nothing and uses no network.
#   bash scripts/benchmark.sh                                  with the project's environment, or python3 where there is none
#   PYTHON=python3 bash scripts/benchmark.sh --set gpu --output-folder out      with any Python; no CPU set where a GPU is missing
#   bash scripts/benchmark.sh --seconds 180                    less time: says at once which parts it leaves out; more: to spare
#   bash scripts/benchmark.sh --set rehearsal --output-folder x   the GPU's parts at tiny sizes, anywhere
#   bash scripts/benchmark.sh --help                           every option
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
