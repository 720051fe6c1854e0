#!/usr/bin/env bash
# Create the virtual environment and install the project. Safe to run again: seconds when nothing changed.
#   PYTHON           interpreter, default python3 (3.10 - 3.12)
#   VENV             folder of the environment, default .venv
#   EXTRAS           optional dependencies, default "train,eval,deepspeed,wandb,dev"
#   PINS             exact versions instead of the newest, such as "transformers==5.17.* huggingface-hub<2"
#   TORCH_INDEX_URL  wheel index for torch, default: whatever pip is configured with
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON=${PYTHON:-python3} VENV=${VENV:-.venv} EXTRAS=${EXTRAS:-train,eval,deepspeed,wandb,dev}

"$PYTHON" -c 'import sys; v = sys.version_info; sys.exit(None if (3, 10) <= v < (3, 13) else
f"Python {v.major}.{v.minor} was found, 3.10 - 3.12 is needed; set PYTHON to such an interpreter")'
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
python="$VENV/bin/python"

# The folder counts too: the environment runs the code of the checkout that it was made for, so a moved one installs anew.
stamp="$VENV/.setup-stamp"
wanted=$({ cat pyproject.toml scripts/setup.sh; echo "$PWD $EXTRAS ${PINS:-} ${TORCH_INDEX_URL:-}"; "$python" -V; } | sha256sum | cut -d' ' -f1)
if [ "$(cat "$stamp" 2>/dev/null || true)" != "$wanted" ]; then
  # DeepSpeed builds its operators when they are first used; building them here would need a compiler.
  export DS_BUILD_OPS=0 PIP_DISABLE_PIP_VERSION_CHECK=1
  echo "installing into $VENV (extras: $EXTRAS); the first run takes a minute or more"
  # torch comes first, in the range pyproject.toml asks for; the constraint keeps later packages from moving it.
  torch_range=$("$python" -c 'import re; print(re.search(r"\"(torch[<>=~!][^\"]*)\"", open("pyproject.toml").read()).group(1))')
  tr ' ' '\n' <<< "${PINS:-}" > "$VENV/constraints.txt"
  "$python" -m pip install -q -c "$VENV/constraints.txt" ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$torch_range"
  # Not torch.__version__: a wheel may add a local part there that its metadata lacks.
  "$python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' >> "$VENV/constraints.txt"
  "$python" -m pip install -q -c "$VENV/constraints.txt" -e ".[$EXTRAS]"
  "$python" -m pip check
  echo "$wanted" > "$stamp"
fi
"$python" - <<'P'
from importlib.metadata import version
names = ("torch", "transformers")
print(f"ready: Python {__import__('platform').python_version()}, " + ", ".join(f"{name} {version(name)}" for name in names))
P
