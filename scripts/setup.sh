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

# A browser for the tests that open the HTML report: Debian's chromium, where this may install it.
install_browser() {
    local name
    for name in chromium chromium-browser google-chrome; do
        if command -v "$name" >/dev/null; then return; fi
    done
    if command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
        echo "Installing chromium ..."
        if apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qq -y install chromium >/dev/null; then return; fi
    fi
    echo "The tests of the HTML report open it in chromium or google-chrome, and neither is on the PATH. Install one" \
        "(Debian: apt-get install chromium), or run as root where apt-get can." >&2
    return 1
}
