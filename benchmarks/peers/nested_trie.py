"""The trie that published code constrains generation with: a dict of dicts, as in LETTER and LC-Rec."""

from collections.abc import Iterable, Sequence

NestedTrie = dict[int, "NestedTrie"]


def build_nested_trie(paths: Iterable[Sequence[int]]) -> NestedTrie:
    root: NestedTrie = {}
    for path in paths:
        node = root
        for code in path:
            node = node.setdefault(code, {})
    return root


def allowed_codes(root: NestedTrie, prefix: Iterable[int]) -> list[int]:
    node = root
    for code in prefix:
        node = node[code]
    return list(node)
