"""The trie of the peers allows the same codes as ours, so both sides search the same catalogue."""

import torch

from benchmarks.peers.nested_trie import allowed_codes, build_nested_trie
from models.decoding.trie import PrefixTrie

SIZES = (4, 3, 5)


def test_both_tries_allow_the_same_codes():
    codes = torch.stack([torch.randint(size, (30,)) for size in SIZES], dim=1)
    ours, peer = PrefixTrie.build(codes, SIZES), build_nested_trie(codes.tolist())
    for depth in range(3):
        nodes = torch.arange(ours.num_nodes(depth))
        masks = ours.code_mask(depth + 1, *ours.children(depth, nodes))
        for mask, prefix in zip(masks, ours.paths(depth, nodes).tolist(), strict=True):
            assert mask.nonzero()[:, 0].tolist() == sorted(allowed_codes(peer, prefix))
