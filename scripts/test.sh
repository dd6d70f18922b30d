#!/usr/bin/env bash
# Install what the tests need and run them; arguments go to pytest.   bash scripts/test.sh -m slow   runs the soak tests
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
. scripts/environment.sh
has_browser() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
if ! has_browser >/dev/null && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "installing chromium with apt-get: a test opens a report in it, and is skipped without"
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium >/dev/null; } || echo "could not; going on without"
fi
python -m pytest -n 2 --dist loadfile "$@"  # starting DeepSpeed leaves a core idle
