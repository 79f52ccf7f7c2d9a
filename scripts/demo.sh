#!/usr/bin/env bash
# From a fresh machine to pictures: two emoji drawn with dense and with neighborhood attention, side by side, with times
# and how alike they are. The first third of the steps, where the composition is made, stays dense.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras diffusers
out="${1:-out/demo}"
"$venv/bin/visattn" generate image --model emoji --prompt "bus, gradient" --prompt "post office, gradient" \
    --pattern "na(window=16x16, stride=8x8)" --steps 12 --dense-steps 4 --compare --seed 1 --out "$out" --force
