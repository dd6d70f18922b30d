#!/usr/bin/env bash
# Install the package, make a corpus from Python's own source, train a small GPT-2 with sequence length warmup and plot its curves.
# Safe to rerun: finished parts are skipped, and training resumes where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
. scripts/environment.sh
ranks=$((accelerators > 0 ? accelerators : 2))
mkdir -p runs

echo "1/5  this machine"
slw doctor runs

echo "2/5  corpus: the source of Python's standard library, as corpus/stdlib.bin and .idx"
slw prepare --stdlib --train-vocab 512 --out corpus/stdlib

echo "3/5  plan: the lengths, tokens and learning rates of this run"
slw plan configs/tiny_cpu.json

echo "4/5  training on $ranks ranks with DeepSpeed (the first run compiles DeepSpeed's C++ parts for a minute)"
deepspeed --num_accelerators "$ranks" scripts/train_gpt2.py --config configs/tiny_cpu.json --save runs/quickstart

echo "5/5  result"
slw report runs/quickstart --png runs/quickstart/curves.png --overwrite --out runs/quickstart/report
echo "checkpoint       $(ls -d runs/quickstart/global_step* | sort -V | tail -n 1) (loads with transformers too)"
