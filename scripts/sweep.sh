#!/usr/bin/env bash
# Make a table of the paper: train and evaluate what is missing of it; sets the environment up when needed.
#   bash scripts/sweep.sh configs/sweeps/table5.yaml             trainings and evaluations on every visible GPU
#   bash scripts/sweep.sh configs/sweeps/table5.yaml --dry-run   every command, what is done and what is missing
#   bash scripts/sweep.sh configs/sweeps/tiny.yaml               the same in the tiny world, on two CPU cores
# Further arguments (--train.batch-size 16) are added to every training. The same command again goes on where it was.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"

venv=${VENV:-.venv}
case "$venv" in /*) ;; *) venv="$root/$venv" ;; esac
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000} TOKENIZERS_PARALLELISM=false # as scripts/train.sh
exec "$venv/bin/python" -m dynamic_llava.sweep "$@"
