"""Sample, then match: the only verifier.

The sampler has already put the target's own token (its *choice*) behind every node. Starting at the root, a
child whose token equals the choice at its parent is accepted; the walk ends where no child matches, and the
choice there is the *bonus*. Since siblings are distinct, at most one child matches, so the path is unique.
What is emitted is exactly what plain decoding would have chosen, whatever the tree was. Pure tensors, no
state.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.core import DraftTree, PromptChunk, Verdict


def accept(tree: DraftTree, choice: Tensor) -> Verdict:
    """Walk every tree of the batch along the target's choices.

    choice: [B, N] int64, the target's token after each node. Returns the accepted path, its length and the
    bonus.

    Example: tokens [the, cat, dog, sat], parents [-1, 0, 0, 1] and choices [cat, sat, ran, down] accept nodes
    0, 1 and 3; the bonus is "down".
    """
    num_seqs, num_nodes = tree.tokens.shape
    rows = torch.arange(num_seqs, device=tree.tokens.device)
    parent = tree.parents.clamp(min=0)
    agrees = (tree.parents >= 0) & (tree.tokens == choice.gather(1, parent))
    path = torch.full_like(tree.parents, -1)
    path[:, 0] = 0
    length = torch.ones(num_seqs, dtype=torch.int64, device=tree.tokens.device)
    last = torch.zeros(num_seqs, dtype=torch.int64, device=tree.tokens.device)
    for node in range(1, num_nodes):  # parents precede children, so one pass in node order follows the path
        taken = agrees[:, node] & (tree.parents[:, node] == last)
        place = length.clamp(max=num_nodes - 1)
        path[rows, place] = torch.where(taken, node, path[rows, place])
        length = length + taken
        last = torch.where(taken, node, last)
    return Verdict(path, length, choice.gather(1, last[:, None])[:, 0])


def accept_all(chunk: PromptChunk, choice: Tensor) -> Verdict:
    """The verdict on known text: everything is accepted; the bonus is the next known token, or the choice.

    choice: [B, 1] int64, the target's token after the last real node.
    """
    node = torch.arange(chunk.tokens.shape[1], device=chunk.tokens.device)[None]
    path = torch.where(node < chunk.num_nodes[:, None], node, -1)
    bonus = torch.where(chunk.next_token >= 0, chunk.next_token, choice[:, 0])
    return Verdict(path, chunk.num_nodes, bonus)
