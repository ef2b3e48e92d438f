#!/usr/bin/env bash
# From nothing to a small model that chats, in minutes on two CPU cores: makes .venv, then pretrains, fine-tunes (SFT),
# aligns (DPO) and, from the fine-tuned model too, reinforces (GRPO) a 1.7 M-parameter GPT on dataset/sample, and prints
# what each stage did. Every run starts over.
#   bash scripts/quickstart.sh
#   SEEDLING_PYTHON=python3.12 bash scripts/quickstart.sh     another interpreter (3.11 or newer)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${SEEDLING_PYTHON:-${PYTHON:-python3}}"
source scripts/environment.sh

trap 'exit 130' INT TERM  # a stage that is interrupted saves and ends well; the next must not start
OUT=out/quickstart
seconds=()
rm -rf "$OUT/pretrain_128" "$OUT/full_sft_128" "$OUT/dpo_128" "$OUT/grpo_128"
for stage in pretrain full_sft dpo grpo; do
    printf '\n== %s: python train_%s.py --config configs/quickstart_%s.yaml\n' "$stage" "$stage" "$stage"
    started=$SECONDS
    python "train_$stage.py" --config "configs/quickstart_$stage.yaml"
    seconds+=($((SECONDS - started)))
done

printf '\n== scores: python scripts/quickstart_report.py\n'
python scripts/quickstart_report.py --out_dir "$OUT" --seconds "${seconds[@]}"
