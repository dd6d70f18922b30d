#!/usr/bin/env bash
# Check lint, format, types and the direction of imports without changing files. Fix most problems with
# `ruff check --fix . && ruff format .`.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/install.sh dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest -q tests/test_layering.py
