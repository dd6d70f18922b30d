#!/usr/bin/env bash
# Create .venv in the repository root and install the package into it. Does nothing if pyproject.toml, setup.py and constraints.txt are
# unchanged. On a machine with NVIDIA GPUs this installs torch's CUDA build.
# usage: bash scripts/install.sh [EXTRA]     EXTRA: train (default), or dev for the tests
set -euo pipefail
cd "$(dirname "$0")/.."
extra=${1:-train}
made_for=".venv/installed-$extra"
wanted=$(cat pyproject.toml setup.py constraints.txt | cksum)
if [ "$(cat "$made_for" 2>/dev/null)" = "$wanted" ]; then
    exit 0
fi
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "error: python3 is $(python3 --version 2>&1); Python 3.11 or later is needed" >&2
    exit 1
}
echo "installing into .venv (a few minutes the first time)"
[ -x .venv/bin/python ] || python3 -m venv .venv || {
    echo "error: python3 can't create virtual environments; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
}
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$extra]"
echo "$wanted" > "$made_for"
