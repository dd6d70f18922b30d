#!/usr/bin/env bash
# Install the test dependencies into .venv and run the tests; arguments are passed to pytest. With -m slow, run the soak tests.
# A test that needs something this machine lacks is skipped, and the summary names it. SEQLEN_TEST_WITHOUT=fp16,compiler,browser,npm
# runs the tests as on a machine without these.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
. scripts/environment.sh
python -m pytest -n 2 --dist loadfile "$@"  # starting DeepSpeed leaves a core idle
