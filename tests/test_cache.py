"""ops/cache.py: what a cache keeps, and that attention over it equals attention without one."""

import torch
from helpers import empty_cache, last_logits, random_ids, random_trees, sequences

from evaluate import score_packs
from ops.packs import pack_trees


def test_cached_decoding_equals_uncached(tiny):
    ids, slots = random_ids(2, 30), torch.arange(30)
    cache = empty_cache(tiny.config, 2, 40)
    causal = (slots[:20] <= slots[:20, None])[None, None]
    with torch.no_grad():
        whole = tiny(ids)
        prefix = tiny(ids[:, :20], slots[:20].expand(2, 20), causal, cache.layers)
        assert (prefix - whole[:, :20]).abs().max() < 1e-4
        for t in range(20, 30):
            position, visible = torch.full((2, 1), t), (slots[: t + 1] <= t)[None, None, None]
            step = tiny(ids[:, t : t + 1], position, visible, cache.layers)
            assert (step[:, 0] - whole[:, t]).abs().max() < 1e-4


def test_a_tree_larger_than_a_pack_is_split_and_its_prefix_computed_once(tiny, monkeypatch):
    trees = [random_trees(1, 8)[0], *random_trees(2, 2, seed=1), random_trees(1, 30, seed=2)[0]]
    packs = pack_trees(trees, 40)
    assert sum(len(p.leaves) for p in packs) == 8 + 4 + 30
    assert {len({t for t, _ in p.leaves}) for p in packs if p.shared_prefix} == {1}

    read, forward = [], tiny.forward

    def counted(ids, *inputs, **options):
        read.append(ids.shape[1])
        return forward(ids, *inputs, **options)

    monkeypatch.setattr(tiny, "forward", counted)
    scores = score_packs(tiny, packs, [17, 400])
    of_split = {t for p in packs if p.shared_prefix for t, _ in p.leaves}
    assert len(of_split) == 2
    repeated = sum(len(p.ids) for p in packs) - sum(read)
    once = sum(len(trees[t].prefix) for t in of_split)
    assert repeated == sum(p.shared_prefix for p in packs) - once

    shuffled = score_packs(tiny, packs[::-1], [17, 400])  # any order will do
    for (t, b), found in scores.items():
        alone = last_logits(tiny, sequences(trees[t])[b])[[17, 400]]
        assert (torch.tensor(found) - alone).abs().max() < 1e-4
        assert (torch.tensor(shuffled[t, b]) - alone).abs().max() < 1e-4


def test_a_cache_grows_shrinks_and_moves_rows_without_changing_what_it_keeps(tiny):
    cache = empty_cache(tiny.config, 3, 10)
    (first, *_), generator = cache.layers, torch.Generator().manual_seed(0)
    for layer in cache.layers:
        layer.keys.normal_(generator=generator)
        layer.values.normal_(generator=generator)
    keys, values = first.keys.clone(), first.values.clone()

    cache.grow(16)
    assert cache.slots == 16
    assert torch.equal(first.keys[:, :, :10], keys)
    assert torch.equal(first.values[:, :, :10], values)
    cache.move(2, 0, 7)
    assert torch.equal(first.keys[0, :, :7], keys[2, :, :7])
    assert torch.equal(first.keys[0, :, 7:10], keys[0, :, 7:])
    cache.shrink(2)
    assert {tensor.shape[0] for layer in cache.layers for tensor in vars(layer).values()} == {2}
    assert torch.equal(first.values[1, :, :10], values[1])
