#!/usr/bin/env bash
# From a fresh machine to pictures: two emoji and a clip of a third drawn with dense and with neighborhood attention, side
# by side, with times and how alike they are. The first steps, where the composition is made, stay dense.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras diffusers
out="${1:-out/demo}"
"$venv/bin/visattn" generate image --model emoji --prompt "bus, gradient" --prompt "post office, gradient" \
    --pattern "na(window=16x16, stride=8x8)" --steps 12 --dense-steps 4 --compare --seed 1 --out "$out" --force
"$venv/bin/visattn" generate video --model animoji --prompt "waving hand, 3d" \
    --pattern "na(window=8x8x8, stride=4x4x4)" --steps 8 --dense-steps 4 --compare --seed 1 --out "$out/clip" --force
