"""How the nodes of one step are divided, on numbers alone.

A step has a budget of nodes (``max_num_batched_tokens``), for its decodes and its chunks of prompts:

- Every decode has its root.
- Prompts get a quarter of the budget if they need it, and whatever the decodes leave; rather than taking
  more, trees are cut, all to the same size.
- Prompts are taken whole, in order. Where one does not fit it is cut, and half of what is left goes first to
  prompts behind it, of the same priority, that it lets through whole: a short question does not wait for a
  long document to be read, and the document gets on.
"""

from __future__ import annotations

_PROMPT_SHARE = 4  # what part of a step's nodes prompts may claim before trees get any


def divide(
    budget: int, trees: list[int], prompts: list[int], priorities: list[int]
) -> tuple[list[int], list[int]]:
    """How many nodes each decode and each prompt gets, both in order.

    trees: the most nodes that each decode's tree can have, its root included; there are no more of them than
    the budget has nodes. prompts: nodes that would finish each; priorities: theirs.
    """
    left = budget - len(trees)
    for_prompts = min(-(-budget // _PROMPT_SHARE), sum(prompts))  # rounded up: never nothing
    for_trees = max(left - for_prompts, 0)
    wishes = [num_nodes - 1 for num_nodes in trees]
    most = max(wishes, default=0)
    if sum(wishes) > for_trees:
        most = max(for_trees // len(trees), 1)
    sizes = []
    for wish in wishes:
        more = min(wish, most, for_trees)
        for_trees, left = for_trees - more, left - more
        sizes.append(1 + more)
    return sizes, chunk_sizes(prompts, priorities, left)


def chunk_sizes(needs: list[int], priorities: list[int], budget: int) -> list[int]:
    """How many nodes of a budget each prompt gets, in order; needs: nodes that would finish each.

    Prompts are taken whole until one does not fit. Of what is left it keeps half; with the other half those
    behind it of its own priority are taken whole if they fit, and what then remains is its own too. Example:
    needs of 100, 900, 50 and 300 with a budget of 512 get 100, 362, 50 and 0.
    """
    sizes = [0] * len(needs)
    for place, need in enumerate(needs):
        if need > budget:
            for_others = budget // 2
            for later in range(place + 1, len(needs)):
                if priorities[later] == priorities[place] and needs[later] <= for_others:
                    sizes[later] = needs[later]
                    for_others, budget = for_others - needs[later], budget - needs[later]
            sizes[place] = budget
            break
        sizes[place] = need
        budget -= need
    return sizes
