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
    if tree.tokens.device.type == "cpu":
        return _accept_on_host(tree, choice)
    return accept_on_device(tree, choice)


def accept_on_device(tree: DraftTree, choice: Tensor) -> Verdict:
    """As ``accept``, for all nodes at once and without asking the device for anything."""
    num_nodes = tree.tokens.shape[1]
    node = torch.arange(num_nodes, device=tree.tokens.device)
    agrees = tree.tokens == choice.gather(1, tree.parents.clamp(min=0))
    agrees[:, 0] = True  # the root was chosen a step ago
    agrees &= tree.real()
    # A node is on the path if it and all its ancestors agree; in node order, which parents lead, that is the
    # path.
    on_path = ~(tree.ancestors() & ~agrees[:, None]).any(dim=-1)
    ordered = torch.where(on_path, node, num_nodes).sort(dim=1).values
    length = on_path.sum(dim=1)
    last = ordered.gather(1, (length - 1)[:, None])
    return Verdict(torch.where(ordered < num_nodes, ordered, -1), length, choice.gather(1, last)[:, 0])


def _accept_on_host(tree: DraftTree, choice: Tensor) -> Verdict:
    """The same on a CPU, where loops over a few numbers are faster than two dozen tensor calls."""
    paths, bonuses = list[list[int]](), list[int]()
    for tokens, parents, choices in zip(
        tree.tokens.tolist(), tree.parents.tolist(), choice.tolist(), strict=True
    ):
        path = [0]
        for node in range(1, len(tokens)):  # children come after their parents
            if parents[node] == path[-1] and tokens[node] == choices[path[-1]]:
                path.append(node)
        paths.append(path)
        bonuses.append(choices[path[-1]])
    num_nodes = tree.tokens.shape[1]
    return Verdict(
        torch.tensor([path + [-1] * (num_nodes - len(path)) for path in paths]),
        torch.tensor([len(path) for path in paths]),
        torch.tensor(bonuses),
    )


def accept_all(chunk: PromptChunk, choice: Tensor) -> Verdict:
    """The verdict on known text: everything is accepted; the bonus is the next known token, or the choice.

    choice: [B, 1] int64, the target's token after the last real node.
    """
    node = torch.arange(chunk.tokens.shape[1], device=chunk.tokens.device)[None]
    path = torch.where(node < chunk.num_nodes[:, None], node, -1)
    bonus = torch.where(chunk.next_token >= 0, chunk.next_token, choice[:, 0])
    return Verdict(path, chunk.num_nodes, bonus)
