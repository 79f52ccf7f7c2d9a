"""A DINOv2 of transformers with random weights, under a window, on a picture that the embedded emoji model draws.

`python -m tests.support.dinov2_run PICTURE.png` draws what a token reads, and prints the report.
"""

import sys

import numpy as np
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

import visattn
from visattn import maps
from visattn.canvas import column, row, text
from visattn.maps.heat import enlarged, picture, plane, rooted
from visattn.pipelines.load import load_pipeline

PATTERN, SIDE, PATCH = "na(window=9x9)", 96, 4
TOKEN = 12 * (SIDE // PATCH) + 12


def drawn(call, image):
    """The picture, and what its middle reads in each head, dense and under the window."""
    first, grid = call.layout.prefix, call.layout.grid
    found = maps.rows(call, [first + TOKEN], PATTERN)
    parts = [column([text("a red apple, 3d", size=12), enlarged(image, 192)], gap=2)]
    for head in range(call.q.shape[2]):
        shown = [picture(rooted(plane(t[0, head, 0, first:], grid)), 192) for t in (found.dense, found.sparse)]
        names = (f"head {head}, dense", f"head {head}, {PATTERN}")
        parts += [column([text(n, size=12), p], gap=2) for n, p in zip(names, shown, strict=True)]
    return row(parts, gap=8, wrap=1000)


@torch.no_grad()
def main():
    """Entry point."""
    pipe = load_pipeline("emoji", "cpu")
    pipe.set_progress_bar_config(disable=True)
    make = torch.Generator().manual_seed(0)
    image = pipe("a red apple, 3d", generator=make, num_inference_steps=8, height=64, width=64).images[0]
    image = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "initializer_range": 0.2}
    model = Dinov2Model(Dinov2Config(image_size=SIDE, patch_size=PATCH, **sizes)).eval()
    stock = model(pixels).last_hidden_state
    call = maps.calls(model, lambda: model(pixels))[0]
    with visattn.apply(model, PATTERN, backend="tiles") as handle:
        model(pixels)
        print(handle.report())
    same = torch.equal(model(pixels).last_hidden_state, stock)
    print("the features after remove() are those from before to the bit:", same)
    drawn(call, image).quantize(256).save(sys.argv[1], optimize=True)


if __name__ == "__main__":
    main()
