#!/usr/bin/env bash
# From a fresh machine to pictures: digits drawn with dense and with neighborhood attention, side by side.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras diffusers
out="${1:-out/demo}"
"$venv/bin/visattn" generate image --model digits --label 2,3,5,8 --pattern "na(window=9x9)" \
    --compare --seed 0 --out "$out" --force
