"""Rotation, masks, and the cache that makes one step equal the whole."""

import pytest
import torch

from freeze_omni_lite.attention import (
    KVCache,
    TransformerBlock,
    causal_mask,
    chunk_mask,
    lengths_mask,
    rotary,
    rotation,
)


def scores(query, key, offset):
    """Attention score of a query 3 places after a key, at position `offset`."""
    places = torch.tensor([offset, offset + 3])
    turned = [rotary(v[None, None, None], rotation(places[i : i + 1], 16)) for i, v in ((1, query), (0, key))]
    return (turned[0] * turned[1]).sum()


def test_rotary_depends_on_distance_only_even_after_an_hour():
    query, key = torch.randn(2, 16)
    torch.testing.assert_close(scores(query, key, 0), scores(query, key, 90_000), atol=1e-5, rtol=0)


def test_rotary_keeps_length_and_position_zero():
    x = torch.randn(2, 3, 5, 8)
    turned = rotary(x, rotation(torch.arange(5), 8))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(turned[:, :, 0], x[:, :, 0])


def naive_chunk_mask(frames, chunk_frames, left_chunks):
    def sees(query, key):
        behind = query // chunk_frames - key // chunk_frames
        return 0 <= behind <= (frames if left_chunks is None else left_chunks)

    return torch.tensor([[sees(q, k) for k in range(frames)] for q in range(frames)])


MASKS = [(8, 4, 0), (9, 4, 1), (12, 3, None), (5, 1, 2), (4, 9, 0)]


@pytest.mark.parametrize("frames, chunk_frames, left", MASKS)
def test_chunk_mask_equals_its_definition(frames, chunk_frames, left):
    mask = chunk_mask(frames, chunk_frames, left)
    assert torch.equal(mask, naive_chunk_mask(frames, chunk_frames, left))
    assert mask.diagonal().all()


def test_masks():
    assert causal_mask(2, 3).int().tolist() == [[1, 1, 0], [1, 1, 1]]
    assert lengths_mask(torch.tensor([0, 2]), 3).int().tolist() == [[0, 0, 0], [1, 1, 0]]
    with pytest.raises(ValueError, match="at least 1 frame"):
        chunk_mask(4, 0)


@pytest.mark.parametrize("gated", [True, False])
@torch.no_grad()
def test_cached_steps_equal_the_whole(gated):
    block, x = TransformerBlock(32, 4, 48, gated), torch.randn(2, 150, 32)
    whole = block(x, rotation(torch.arange(150), 8), causal_mask(150, 150))
    cache = KVCache()
    first = block(x[:, :100], rotation(torch.arange(100), 8), causal_mask(100, 100), cache)
    steps = [block(x[:, i : i + 1], rotation(torch.tensor([i]), 8), None, cache) for i in range(100, 150)]
    torch.testing.assert_close(torch.cat([first, *steps], dim=1), whole, atol=1e-5, rtol=1e-4)
    assert len(cache) == 150


@torch.no_grad()
def test_window_keeps_the_newest_and_stays_flat():
    cache, seen = KVCache(window=8), torch.zeros(1, 1, 0, 2)
    sizes = []
    for i in range(200):
        new = torch.full((1, 1, 4, 2), float(i))
        seen = torch.cat([seen, new], dim=2)
        keys, _ = cache.append(new, new)
        assert torch.equal(keys, seen[:, :, -12:])  # the window plus what was just added
        sizes.append(cache.nbytes())
    assert len(set(sizes)) == 1


def test_fork_and_crop():
    cache, x = KVCache(), torch.randn(1, 2, 3, 4)
    cache.append(x, x)
    twin = cache.fork()
    twin.append(x, x)
    assert (len(cache), len(twin)) == (3, 6)
    twin.crop(2)
    assert torch.equal(twin.view()[0], x[:, :, :2]) and torch.equal(cache.view()[0], x)
    with pytest.raises(ValueError, match="cannot crop"):
        twin.crop(3)
    assert len(KVCache().fork()) == 0


def test_block_refuses_widths_that_do_not_split():
    with pytest.raises(ValueError, match="even width"):
        TransformerBlock(30, 6 + 4, 8)
