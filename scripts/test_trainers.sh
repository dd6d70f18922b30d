#!/usr/bin/env bash
# Test the trainers whose requirements conflict with those of this package, each in a virtual environment of its own.
# usage: bash scripts/test_trainers.sh [NAME...] [-- PYTEST_ARGUMENT...]
#   NAME             a trainer with a file tests/environments/NAME.txt; default: all of them
#   PYTEST_ARGUMENT  passed to pytest, for example -k resume
# The environment is .cache/trainers/NAME. It is reused until the requirements change. NAME.txt lists the trainer and the
# packages that it needs, NAME.overrides.txt the versions that replace its own pins. uv installs them, and is installed itself if
# it is missing. PYTHON names another interpreter than python3: axolotl needs Python 3.12. uv reads UV_FIND_LINKS, else
# PIP_FIND_LINKS; UV_TORCH_BACKEND=cpu selects PyTorch's CPU builds.
set -euo pipefail
cd "$(dirname "$0")/.."

names=()
while [ $# -gt 0 ]; do
    case "$1" in
    -h | --help) sed -n '2,/^set /{s/^# \{0,1\}//p}' "$0" && exit ;;
    --) shift && break ;;
    *) names+=("$1") && shift ;;
    esac
done
valid=$(ls tests/environments | sed -n '/\.overrides\.txt$/d; s/\.txt$//p' | paste -sd ' ')
for name in "${names[@]}"; do
    [ -f "tests/environments/$name.txt" ] && [ "${name%.overrides}" = "$name" ] || {
        echo "error: $name is not a trainer with an environment of its own; valid are: $valid" >&2
        exit 1
    }
done
[ "${#names[@]}" -gt 0 ] || read -ra names <<< "$valid"

find_uv() {
    command -v uv && return
    local folder=.cache/trainers/.uv
    [ -x "$folder/bin/uv" ] || { python3 -m venv "$folder" && "$folder/bin/pip" install --quiet uv; }
    echo "$folder/bin/uv"
}

# Make the environment of a trainer unless it was made from the same files.
prepare() {
    local folder=".cache/trainers/$1" requirements="tests/environments/$1.txt" overrides="tests/environments/$1.overrides.txt"
    [ -f "$overrides" ] || overrides=/dev/null
    local tools wanted uv
    tools=$(grep -E '^(hypothesis|psutil|pytest)==' constraints.txt) # what tests/conftest.py imports
    wanted=$(cat "$requirements" "$overrides" pyproject.toml setup.py - <<< "$tools" | cksum)
    [ "$(cat "$folder/installed" 2> /dev/null)" = "$wanted" ] && return
    echo "installing $requirements into $folder (a few minutes the first time)"
    uv=$(find_uv)
    rm -rf "$folder"
    "$uv" venv --quiet --python "${PYTHON:-$(command -v python3)}" "$folder"
    # shellcheck disable=SC2086 # one argument per tool
    UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}" "$uv" pip install --quiet --compile-bytecode --python "$folder/bin/python" \
        --requirement "$requirements" --override "$overrides" $tools --editable . || return
    echo "$wanted" > "$folder/installed"
}

failed=()
for name in "${names[@]}"; do
    echo "== $name"
    prepare "$name" || { failed+=("$name") && continue; }
    # The trainers' own warnings are not errors here.
    DS_ACCELERATOR=cpu OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" ".cache/trainers/$name/bin/python" -m pytest \
        -o filterwarnings=default -m trainers "tests/test_$name.py" "$@" || failed+=("$name")
done
[ "${#failed[@]}" -eq 0 ] || { echo "error: failed: ${failed[*]}" >&2 && exit 1; }
