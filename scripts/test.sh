#!/usr/bin/env bash
# Install what the tests need and run them; arguments go to pytest.   bash scripts/test.sh -m slow   runs the soak tests
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
. scripts/environment.sh
python -m pytest "$@"
