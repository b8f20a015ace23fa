#!/usr/bin/env bash
# Fine-tunes the small embedded model on data that is on every machine, in one process, and scores the last weights
# against the averaged ones. Needs no GPU and no network. Leaves runs/quickstart/ (replaced at the next call).
set -euo pipefail
cd "$(dirname "$0")/.."

if [[ -x .venv/bin/accelerate ]]; then export PATH="$PWD/.venv/bin:$PATH"; fi
config=recipes/configs/classification/quickstart.yaml
rm -rf runs/quickstart

accelerate launch --config_file launch/accelerate/single.yaml --num_cpu_threads_per_process "$(nproc)" \
    recipes/classification.py --config "$config" train.output_dir=runs/quickstart "$@"

echo
echo "The same run under DeepSpeed ZeRO-3 on two processes:"
echo "accelerate launch --config_file launch/accelerate/zero3_cpu.yaml recipes/classification.py" \
    "--config $config train.output_dir=runs/quickstart-zero3"
