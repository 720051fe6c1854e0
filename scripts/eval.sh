#!/usr/bin/env bash
# Evaluate a model on benchmarks, each GPU taking a share of the questions; sets the environment up when needed.
#   bash scripts/eval.sh --model PATH --tasks paper_table1 --data-root DIR --output-folder OUT    on every visible GPU
#   bash scripts/eval.sh --tasks list --data-root DIR    the benchmarks, their files, and what is missing
#   bash scripts/eval.sh --help                          every option
#   PROCESSES   how many processes, one per GPU; default: as many as GPUs are visible, 1 without any
# The answers do not depend on the number of processes. The same command again goes on where an interrupted run was.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"

venv=${VENV:-.venv}
case "$venv" in /*) ;; *) venv="$root/$venv" ;; esac
python="$venv/bin/python"
export TOKENIZERS_PARALLELISM=false # a batch is a few short prompts

processes=${PROCESSES:-}
case " $* " in
  *" --model "* | *" --model="*) ;;
  *) processes=1 ;; # a list, help or a score needs no GPU
esac
if [ -z "$processes" ]; then
  processes=$("$python" -c 'import torch; print(max(1, torch.accelerator.device_count()))')
fi
if [ "$processes" = 1 ]; then
  exec "$python" -m dynamic_llava.eval "$@"
fi
echo "$processes processes, each with a share of the questions" >&2
# Behind `--` nothing is taken for an option of torchrun, which accepts abbreviations.
exec "$python" -m torch.distributed.run --standalone --nproc-per-node="$processes" -m -- dynamic_llava.eval "$@"
