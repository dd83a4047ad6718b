#!/usr/bin/env bash
# Train twice, once without interruption and once killed (SIGKILL) in the middle and started again,
# and compare the losses of all steps and the adapters: both must be the same to the last bit.
#
#   runs/kill.sh PREPARED_DIR MODEL OUTPUT_DIR
set -euo pipefail
data=${1:?} model=${2:?} out=${3:?}
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"
options=(--model "$model" --data_dir "$data" --max_steps 24 --global_batch_size 8 --save_every 4
  --eval_every 8 --eval_clips 16 --log_every 1)
python train_lora.py "${options[@]}" --output_dir "$out/whole"
python train_lora.py "${options[@]}" --output_dir "$out/killed" &
until compgen -G "$out/killed/checkpoints/step-*8/state.json" >/dev/null; do sleep 0.2; done
sleep 5 # some steps past the checkpoint
kill -KILL $!
wait $! || echo "killed with SIGKILL"
python train_lora.py "${options[@]}" --output_dir "$out/killed"
python - "$out" <<'PYTHON'
import json
import sys
from pathlib import Path


def losses(run: str) -> list[tuple]:
    lines = Path(sys.argv[1], run, "metrics.jsonl").read_text().splitlines()
    keys = ("step", "loss", "eval_loss", "wer_raw")
    return [tuple(record.get(key) for key in keys) for record in map(json.loads, lines)]


def adapter(run: str) -> bytes:
    return Path(sys.argv[1], run, "adapter", "adapter_model.safetensors").read_bytes()


same = losses("whole") == losses("killed")
print(f"{len(losses('whole'))} records, the same losses: {same}")
print(f"the same adapter: {adapter('whole') == adapter('killed')}")
sys.exit(not (same and adapter("whole") == adapter("killed")))
PYTHON
