#!/usr/bin/env bash
# Train; sets the environment up when needed.
#   bash scripts/train.sh                              the tiny world: minutes on two CPU cores, no download
#   bash scripts/train.sh --seed 1                     the same with another seed (--seeds 5: mean and interval)
#   bash scripts/train.sh configs/tiny_long.yaml       its long form: descriptions of 144 to 219 tokens, three output rates
#   bash scripts/train.sh CONFIG.yaml [overrides]      any LLaVA-format data, e.g. --train.learning-rate 1e-5
#   bash scripts/train.sh CONFIG.yaml --help           every setting with its meaning
# Paths in a configuration file are relative to the folder this is called from.
# One process per visible GPU: plain python, torchrun, or with train.deepspeed the deepspeed launcher; a line says which.
#   PROCESSES=2                                        another number, also on the CPU
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=... MASTER_PORT=...   several machines: the same command on each, by its rank
# SIGTERM or Ctrl-C saves and stops (exit code 75); the same command goes on. 74: a file could not be
# written (disk full, read-only). 76: a loss, gradient or weight became NaN or infinite. 2: a mistake.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"

venv=${VENV:-.venv}
case "$venv" in /*) ;; *) venv="$root/$venv" ;; esac
command=(dynamic_llava.tiny job "$root/configs/tiny.yaml")
if [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; then
  # A file with a tiny or a smol section, such as a copy of configs/tiny.yaml, is that world's whole job; any other one
  # is a training.
  command=(dynamic_llava.train.launch)
  for world in tiny smol; do
    if grep -qs "^$world:" "$1"; then command=("dynamic_llava.$world" job); fi
  done
fi
# Waiting threads spin for microseconds only: long spinning makes small models much slower on a machine that does other
# work too, and not spinning at all makes them slower on a free one.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
export TOKENIZERS_PARALLELISM=false # worker processes are forked after the first use of the tokenizer
exec "$venv/bin/python" -m "${command[@]}" "$@"
