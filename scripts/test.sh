#!/usr/bin/env bash
# The whole test suite in the project's environment. Arguments go to pytest: scripts/test.sh -k neighborhood
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras dev
# natten is a peer to compare with; it builds against the installed torch, and the tests do without it too.
if ! "$PY" -c "import natten" 2>/dev/null && [ ! -e "$venv/.no-natten" ]; then
    "$PY" -m pip install --quiet --disable-pip-version-check --no-build-isolation natten || touch "$venv/.no-natten"
fi
"$PY" -m pytest "$@"
