#!/usr/bin/env bash
# Test the plug-in inside lmms-eval, offline, on a toy task, in an environment of its own. What lmms-eval declares, torchvision
# and exact versions of other packages among it, does not fit beside this project's; so it goes in without dependencies, on
# what the extra `lmms-eval` lists.
#   bash scripts/test_lmms_eval.sh [pytest arguments]
#   LMMS_VENV  folder of the environment, default .venv-lmms; PYTHON and TORCH_INDEX_URL as in setup.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export VENV=${LMMS_VENV:-.venv-lmms} EXTRAS=lmms-eval,train,dev
python="$VENV/bin/python"

# setup.sh checks that every declared dependency is there, which is not so with lmms-eval in place.
[ ! -x "$python" ] || "$python" -m pip uninstall -q -y lmms-eval
bash scripts/setup.sh
"$python" -m pip install -q --no-deps --disable-pip-version-check lmms-eval==0.7.3
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "$python" -m pytest -q --durations 5 "$@" tests/eval/lmms
