#!/usr/bin/env bash
# Run the tests, set-up included.
#   bash scripts/test.sh [pytest arguments]        the fast set
#   bash scripts/test.sh --all [pytest arguments]  the slow proofs as well
#   bash scripts/test.sh --soak [MINUTES]          random worlds, kills, faults, spoilt files, long runs: an hour, and a table
#   WORKERS  test processes, default: one per core, at most 8
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
python="${VENV:-.venv}/bin/python"

# One thread per process: the models are tiny, and more threads only get in one another's way.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
if [ "${1:-}" = "--soak" ]; then
  shift
  exec "$python" -m tests.soak "$@"
fi
selection=(-m "not slow")
note="the fast set; --all adds the tests marked slow"
if [ "${1:-}" = "--all" ]; then
  shift
  selection=() note="every test, slow proofs included"
fi
cores=$("$python" -c 'import os; print(min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))')
workers=${WORKERS:-$cores}
echo "running $note, in $workers process(es)"
exec "$python" -m pytest -q -n "$workers" --durations 15 ${selection[@]+"${selection[@]}"} "$@"
