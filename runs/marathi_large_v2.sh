#!/usr/bin/env bash
# Reference run: whisper-large-v2 on Common Voice Marathi, with the hyperparameters of
# the PEFT notebook's recipe (int8 base, r=32 on q_proj,v_proj, lr 1e-3, batch 8,
# 3 epochs, 50 warm-up steps of about 2,400).
#
#   runs/marathi_large_v2.sh cv-corpus-XX/mr
#
# Needs one GPU with 16 GB. The notebook reports WER 36.1 raw and 14.0 under OpenAI's normaliser on
# Common Voice 11, after training on train and validation together. This script keeps validation
# apart, and was never run: time and WER of ours are not known yet.
set -euo pipefail
source=${1:?usage: runs/marathi_large_v2.sh COMMON_VOICE_FOLDER}
model=openai/whisper-large-v2
cd "$(dirname "$0")/.."
python preprocess.py --source "$source" --language mr --model $model --output_dir marathi/prepared
accelerate launch --quiet --mixed_precision fp16 train_lora.py \
  --model $model --data_dir marathi/prepared --output_dir marathi/run \
  --quantize int8 --lora_rank 32 --lora_alpha 64 --lora_targets q_proj,v_proj --lora_dropout 0.05 \
  --learning_rate 1e-3 --warmup_ratio 0.02 --schedule linear --global_batch_size 8 --num_epochs 3
python eval_wer.py --model $model --adapter marathi/run/adapter --data_dir marathi/prepared \
  --compare_base true --output_dir marathi/wer
