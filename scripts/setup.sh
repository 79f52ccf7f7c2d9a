#!/usr/bin/env bash
# Makes the project's virtual environment, once. Sourced by the other scripts: afterwards $PY is its python.
#   VISATTN_VENV    where the environment lives (.venv beside this folder)
#   VISATTN_PYTHON  which python makes it (the newest of python3.13 ... python3.11, python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv="${VISATTN_VENV:-$PWD/.venv}"
PY="$venv/bin/python"
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

find_python() {
    local name
    for name in "${VISATTN_PYTHON:-}" python3.13 python3.12 python3.11 python3 python; do
        if [ -n "$name" ] && "$name" -c 'import sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    echo "visattn needs Python 3.11 or newer with venv: none found. Install one or set VISATTN_PYTHON to it." >&2
    return 1
}

# Installs the given extras unless this pyproject.toml was installed with them before.
install_extras() {
    local extras="$1" stamp done_before
    stamp="$(cksum <pyproject.toml | cut -d' ' -f1) $extras"
    done_before="$venv/.visattn-$extras"
    if [ "$(cat "$done_before" 2>/dev/null)" = "$stamp" ]; then return; fi
    if [ ! -x "$PY" ]; then
        local python
        python="$(find_python)"
        echo "Making $venv with $("$python" --version) ..."
        "$python" -m venv "$venv"
    fi
    echo "Installing visattn[$extras]: the first time takes some minutes, torch alone is several GB ..."
    "$PY" -m pip install --quiet --disable-pip-version-check --editable ".[$extras]"
    echo "$stamp" >"$done_before"
}
