#!/usr/bin/env bash
# From a fresh machine to pictures: two emoji and a clip of a third drawn with dense attention and with the blocks of keys
# that matter most, side by side, with times and how alike they are (scripts/demo.py). The argument is the folder: out/demo.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras diffusers
"$PY" -m scripts.demo "$@"
