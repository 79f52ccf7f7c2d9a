#!/usr/bin/env bash
# Lint, format and types, as CI and the pre-commit hook check them.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras dev
"$venv/bin/ruff" check .
"$venv/bin/ruff" format --check .
"$venv/bin/pyright" --pythonpath "$PY"
