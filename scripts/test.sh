#!/usr/bin/env bash
# The test suite in the project's environment, on all cores. Arguments go to pytest: scripts/test.sh -k neighborhood
# Tests of more than 20 seconds are left out; run them with: scripts/test.sh -m slow
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras dev
# natten is a peer to compare with; it builds against the installed torch, and the tests do without it too.
if ! "$PY" -c "import natten" 2>/dev/null && [ ! -e "$venv/.no-natten" ]; then
    "$PY" -m pip install --quiet --disable-pip-version-check --no-build-isolation natten || touch "$venv/.no-natten"
fi
# tests/conftest.py has the order of the files.
"$PY" -m pytest -n auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not slow" "$@"
