#!/usr/bin/env bash
# Install what the tests need into .venv and run them; arguments go to pytest.   bash scripts/test.sh -m slow   runs the soak tests
# A test that needs something this machine lacks is skipped, and the summary names it. SEQLEN_TEST_WITHOUT=fp16,compiler,browser,npm
# runs the tests as on a machine without these.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
. scripts/environment.sh
python -m pytest -n 2 --dist loadfile "$@"  # starting DeepSpeed leaves a core idle
