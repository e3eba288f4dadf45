"""Tree attention as a loop: every node looks at the committed rows and at its own ancestors, itself included.

float64, one sequence, one node and one head at a time. Ancestors are found by walking up ``parents``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def ancestors_of(parents: Sequence[int], node: int) -> list[int]:
    """The node and its ancestors, root first. Padding (parent -1 past node 0) has only itself."""
    path = [node]
    while parents[path[0]] >= 0:
        path.insert(0, parents[path[0]])
    return path


def tree_attention(
    query: Tensor,
    past_keys: Tensor,
    past_values: Tensor,
    keys: Tensor,
    values: Tensor,
    parents: Sequence[int],
    scale: float | None = None,
) -> Tensor:
    """Attend from every node of a tree behind L committed rows.

    query: [N, H, D]; past_keys, past_values: [L, Hkv, D]; keys, values: [N, Hkv, D]; returns [N, H, D]
    float64. Query head h reads key/value head h // (H / Hkv). The scale is 1 / sqrt(D) unless given.
    """
    num_nodes, num_heads, head_dim = query.shape
    group = num_heads // keys.shape[1]
    factor = 1 / math.sqrt(head_dim) if scale is None else scale
    out = torch.zeros(num_nodes, num_heads, values.shape[2], dtype=torch.float64)
    for node in range(num_nodes):
        seen = ancestors_of(parents, node)
        for head in range(num_heads):
            kv_head = head // group
            rows = torch.cat([past_keys[:, kv_head], keys[seen, kv_head]]).double()
            contents = torch.cat([past_values[:, kv_head], values[seen, kv_head]]).double()
            weights = torch.softmax(rows @ query[node, head].double() * factor, dim=0)
            out[node, head] = weights @ contents
    return out
