"""`visattn.apply` on the vision towers of transformers: a row of the table of known models each."""

import pytest

pytest.importorskip("transformers")

import torch
from torch.nn import functional

import visattn
from tests.support.tiny_towers import PACKED, TOWERS, first, inputs, make
from visattn.clients.transformers.grids import Chunk
from visattn.clients.transformers.order import row_major
from visattn.clients.transformers.records import RECORDS

PATTERN = "na(window=3)"


def test_every_record_has_a_tower():
    assert sorted(record.folder for record in RECORDS if not record.refused) == sorted(TOWERS)


def places(grid_thw, window):
    """Row and column of every token of a packed sequence, image by image, as transformers itself orders them."""
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    found = []
    for frames, rows, columns in grid_thw.tolist():
        one = torch.tensor([[1, rows, columns]])
        own = get_vision_position_ids(one, 2)
        if window:
            index, _ = get_vision_window_index(one, 2, 16, 4)
            own = own.reshape(-1, 4, 2)[index].reshape(-1, 2)
        found += [((rows, columns), own)] * frames
    return found


def hide(monkeypatch, masks, eager=False):
    """Let torch's dense attention see the pairs of a mask only, of the next call of as many tokens; in turns."""
    attend, softmax = functional.scaled_dot_product_attention, torch.Tensor.softmax
    turns = {}

    def find(queries, keys):
        fitting = [mask for mask in masks if len(mask) == queries == keys]
        if fitting:
            turn = turns[len(fitting[0])] = turns.get(len(fitting[0]), -1) + 1
            return fitting[turn % len(fitting)]
        return None

    def masked(q, k, v, attn_mask=None, **kwargs):
        mask = find(q.shape[2], k.shape[2])
        if mask is not None and attn_mask is not None:
            bias = attn_mask.is_floating_point()
            mask = attn_mask.masked_fill(~mask, -torch.inf) if bias else attn_mask & mask
        return attend(q, k, v, attn_mask=attn_mask if mask is None else mask, **kwargs)

    def masked_softmax(logits, dim, **kwargs):
        mask = find(*logits.shape[-2:])
        return softmax(logits if mask is None else logits.masked_fill(~mask, -torch.inf), dim, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", masked)
    if eager:
        monkeypatch.setattr(torch.Tensor, "softmax", masked_softmax)


def mask_of(layout):
    return visattn.dense_mask(visattn.parse(PATTERN), layout)


def sorted_by_pooling(mask, layout):
    """The mask of a stage in the order of transformers itself."""
    from transformers.models.hiera.modeling_hiera import unroll

    places = torch.arange(layout.tokens, dtype=torch.float64)[None, :, None]
    times = {36: 1, 9: 0}[layout.tokens]
    index = unroll(places, layout.grid, (1, 1), [[2, 2]] * times).flatten().long()
    return mask[index][:, index]


@pytest.mark.parametrize("folder", TOWERS)
@torch.no_grad()
def test_a_tower_equals_masked_dense_and_goes_back(folder, monkeypatch):
    model, x, layout = make(folder), inputs(folder), TOWERS[folder][3]
    stock, previous = first(model(**x)), model.config._attn_implementation
    with visattn.apply(model, "dense"):
        assert torch.equal(first(model(**x)), stock)
    with visattn.apply(model, PATTERN, backend="tiles", strict=True) as handle:
        found, again = first(model(**x)), first(model(**x))
        report = handle.report()
    assert torch.equal(found, again)
    assert torch.equal(first(model(**x)), stock)
    assert model.config._attn_implementation == previous
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    layouts = {call.problem.layout for site in report.sites for call in site.calls}
    assert layout in layouts and report.sites_hit == len(report.sites)
    if folder in PACKED:
        masks = []
        for grid, place in places(x["grid_thw"], folder == "qwen2_5_vl"):
            index = place[:, 0] * grid[1] + place[:, 1]
            masks.append(mask_of(visattn.Layout(grid))[index][:, index])
    else:
        masks = [mask_of(each) if folder != "hiera" else sorted_by_pooling(mask_of(each), each) for each in layouts]
    model.config._attn_implementation_internal = "sdpa"  # GIT says that it cannot, but can
    hide(monkeypatch, masks, eager=folder in ("hiera", "swinv2", "timesformer"))
    wanted = first(model(**x))
    assert (wanted - stock).abs().max() > 1e-2 * stock.std()
    assert (found - wanted).abs().max() <= 1e-4 * wanted.std()


@pytest.mark.parametrize(("window", "grid"), [(0, (6, 8)), (0, (2, 4)), (2, (6, 8)), (2, (8, 6)), (3, (10, 14))])
def test_order_of_merged_blocks_is_that_of_transformers(window, grid):
    from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

    own = get_vision_position_ids(torch.tensor([[1, *grid]]), 2)
    if window:
        index, _ = get_vision_window_index(torch.tensor([[1, *grid]]), 2, window * 2 * 4, 4)
        own = own.reshape(-1, 4, 2)[index].reshape(-1, 2)
    order, back = row_major(Chunk(visattn.Layout(grid), 2, window), torch.device("cpu"))
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    assert torch.equal(own[order], torch.stack([rows, columns], -1).reshape(-1, 2))
    assert torch.equal(order[back], torch.arange(len(order)))
