#!/usr/bin/env bash
# The first table of docs/results.md: base and adapter on held-out speakers, at both windows.
#
#   runs/measure.sh COMMON_VOICE_FOLDER LANGUAGE MODEL OUTPUT_DIR
#
# One epoch with the defaults. One hour of speech and whisper-base take about 20 minutes on two cores.
set -euo pipefail
source=${1:?} language=${2:?} model=${3:?} out=${4:?}
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
python preprocess.py --source "$source" --language "$language" --model "$model" \
  --output_dir "$out/prepared"
python train_lora.py --model "$model" --data_dir "$out/prepared" --output_dir "$out/run" \
  --num_epochs 1 --eval_every 66
python eval_wer.py --model "$model" --adapter "$out/run/adapter" --compare_base true \
  --data_dir "$out/prepared" --both_windows true --output_dir "$out/wer"
