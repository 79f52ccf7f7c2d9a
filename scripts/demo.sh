#!/usr/bin/env bash
# From a fresh machine to pictures: two emoji and a clip of a third drawn with dense attention and with the blocks of keys
# that matter most, side by side, with times and how alike they are. The first steps, where the composition is made, stay
# dense; the others keep what the first of them chose.
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
install_extras diffusers
out="${1:-out/demo}"
"$venv/bin/visattn" generate image --model emoji --prompt "bus, gradient" --prompt "post office, gradient" \
    --pattern "topk(keep=0.1, rest=mean, every=8, drift=inf)" --steps 12 --dense-steps 4 --compare --seed 1 --out "$out" --force
"$venv/bin/visattn" generate video --model animoji --prompt "waving hand, 3d" \
    --pattern "topk(keep=0.2, rest=slope, every=4, drift=inf)" --steps 8 --dense-steps 4 --compare --seed 1 --out "$out/clip" --force
