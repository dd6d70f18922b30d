#!/usr/bin/env bash
# Build the documentation into site/. A broken link or anchor is an error.
# usage: bash scripts/docs.sh [--serve]     --serve: serve it at http://127.0.0.1:8000 and rebuild on changes
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
export NO_MKDOCS_2_WARNING=1 # a notice about the future of MkDocs, on every build
case "${1:-}" in
"") .venv/bin/python -m mkdocs build --strict && echo "built site/index.html" ;; # not --quiet, which hides warnings from --strict
--serve) exec .venv/bin/python -m mkdocs serve ;;
*)
    echo "error: $1 is not a flag of docs.sh; give --serve or nothing" >&2
    exit 1
    ;;
esac
