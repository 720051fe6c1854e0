#!/usr/bin/env bash
# Compare the training-free methods that can be given a budget, on the dense control, and the learned one, on the model
# that was trained with it, on the tiny world, over seeds.
#   bash scripts/compare_tiny.sh                 runs/tiny, seeds 0 to 4; results in runs/compare_tiny
#   RUN=runs/tiny SEEDS="0 1" bash scripts/compare_tiny.sh
#   RUN     folder of the main job (bash scripts/train.sh), with seedN/control/model and seedN/both/model for each seed
#   OUT     where results go
#   LIMIT   first questions of each benchmark only, for a trial
# Needs the five seeds of the main job, and for lvis_single NLTK's data: bash scripts/nltk_data.sh, NLTK_DATA set.
# The same command again goes on where an interrupted one was. Three budgets of image tokens (of 64), three of bytes.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/scripts/setup.sh"

venv=${VENV:-.venv}
case "$venv" in /*) ;; *) venv="$root/$venv" ;; esac
python="$venv/bin/python"
export TOKENIZERS_PARALLELISM=false # a batch is a few short prompts
run=${RUN:-runs/tiny} out=${OUT:-runs/compare_tiny}
limit=${LIMIT:+--limit $LIMIT}

# fastv decides where the learned method does; output tokens stay, as images are compared.
image="dense,dynamic:sparsity=image,fastv:layer=2,pyramiddrop,sparsevlm,sparsevlm_plus,dart,vscan"
image+=",divprune,tome,visionzip,vispruner,vispruner:important_ratio=1.0,hired,holov,scope,hiprune,idpruner"
image+=",prumerge_plus"
image+=",random:output_keep_rate=none,structure:output_keep_rate=none,random:layer=0,output_keep_rate=none"
image+=",average_pool,downsample"
stored="dense,dynamic:sparsity=image,fastv:layer=2,divprune,tome,h2o,tova,knorm,snapkv:window=8,streaming_llm,random_window"

"$python" -m dynamic_llava.tiny benchmarks --output-folder "$out/data"
compare() { # FOLDER SEED METHODS TASKS BUDGET
  # shellcheck disable=SC2086 # LIMIT is two words
  "$python" -m dynamic_llava.eval compare --model "$run/seed$2/control/model" --learned-only "$run/seed$2/both/model" \
    --methods "$3" --tasks "$4" --equal "$5" --data-root "$out/data" --output-folder "$out/$1/seed$2" $limit
}
for seed in ${SEEDS:-0 1 2 3 4}; do
  for tokens in 9 16 25; do # 14, 25 and 39 % of an image; squares, as average_pool and downsample can leave
    compare "image_$tokens" "$seed" "$image" pope,gqa,lvis_single "image-tokens=$tokens"
  done
  for bytes in 400000 450000 550000; do # of about 620,000 of a dense prompt
    compare "bytes_$bytes" "$seed" "$stored" pope,gqa,lvis_single "kv-bytes=$bytes"
  done
done
for folder in "$out"/image_* "$out"/bytes_*; do
  set -- "$folder"/seed*
  [ $# -lt 2 ] || "$python" -m dynamic_llava.eval compare-seeds "$@" --output-folder "$folder"
done
echo "tables: $out/*/compare.md"
