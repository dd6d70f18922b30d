#!/usr/bin/env bash
# A killed compilation of DeepSpeed's C++ parts leaves a lock, for which the next one would wait for ever in silence.
# usage: bash scripts/stale_locks.sh FOLDER     FOLDER: TORCH_EXTENSIONS_DIR; status 1 if it has a lock that nobody holds
shopt -s nullglob
status=0
for lock in "$1"/*/lock; do
    # The process that compiles holds its lock open.
    if [ -z "$(find /proc/[0-9]*/fd -lname "$(realpath "$lock")" -print -quit 2>/dev/null)" ]; then
        echo "error: $lock: left by a compilation that was killed, and DeepSpeed would wait for it for ever; type: rm '$lock'" >&2
        status=1
    fi
done
exit "$status"
