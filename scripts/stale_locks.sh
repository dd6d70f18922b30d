#!/usr/bin/env bash
# A killed compilation of DeepSpeed's C++ parts leaves a lock, for which the next one would wait for ever in silence.
# usage: bash scripts/stale_locks.sh FOLDER [--remove]     FOLDER: TORCH_EXTENSIONS_DIR
# Names the locks that nobody holds, with status 1; or removes them.
shopt -s nullglob
status=0
for lock in "$1"/*/lock; do
    # The process that compiles holds its lock open.
    if [ -n "$(find /proc/[0-9]*/fd -lname "$(realpath "$lock")" -print -quit 2>/dev/null)" ]; then
        continue
    elif [ "${2:-}" = --remove ]; then
        rm -f "$lock"
    else
        echo "error: $lock: left by a compilation that was killed, and DeepSpeed would wait for it for ever; type: rm '$lock'" >&2
        status=1
    fi
done
exit "$status"
