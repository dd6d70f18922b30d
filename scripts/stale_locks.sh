#!/usr/bin/env bash
# Find the locks that killed compilations of DeepSpeed's C++ parts left. The next compilation would wait for one silently and for ever.
# usage: bash scripts/stale_locks.sh FOLDER [--remove]     FOLDER: TORCH_EXTENSIONS_DIR
# Prints the locks that no process holds and exits with status 1; with --remove, deletes them instead.
shopt -s nullglob
status=0
for lock in "$1"/*/lock; do
    [ -O "$lock" ] || continue  # another user's, whose processes can't be looked into
    # The process that compiles holds its lock open.
    if [ -n "$(find /proc/[0-9]*/fd -lname "$(realpath "$lock")" -print -quit 2>/dev/null)" ]; then
        continue
    elif [ "${2:-}" = --remove ]; then
        rm -f "$lock"
    else
        echo "error: $lock: left by a killed compilation, and DeepSpeed would wait for it for ever; delete it: rm '$lock'" >&2
        status=1
    fi
done
exit "$status"
