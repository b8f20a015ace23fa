#!/usr/bin/env bash
# Fine-tunes the small embedded model in one process, on data that every machine has, and compares the scores of the
# last and the averaged weights. Needs no GPU and no network. Writes runs/quickstart/; an older one is moved aside.
set -euo pipefail
cd "$(dirname "$0")/.."

accelerate=accelerate
if [[ -x .venv/bin/accelerate ]]; then accelerate=.venv/bin/accelerate; fi
config=recipes/configs/classification/quickstart.yaml
# Threads that spin while they wait slow training to a crawl on a machine that is also doing something else.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
if [[ -e runs/quickstart ]]; then mv runs/quickstart "runs/quickstart-before-$(date +%Y%m%d-%H%M%S)"; fi

"$accelerate" launch --config_file launch/accelerate/single.yaml --num_cpu_threads_per_process "$(nproc)" \
    recipes/classification.py --config "$config" "$@"

echo
echo "The same run under DeepSpeed ZeRO-3 on two processes:"
echo "$accelerate launch --config_file launch/accelerate/zero3_cpu.yaml recipes/classification.py" \
    "--config $config train.output_dir=runs/quickstart-zero3"
