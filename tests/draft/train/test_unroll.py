"""The parallel unrolled forward, its loss and its acceptance figures against one-chain-at-a-time oracles."""

from __future__ import annotations

import pytest
import torch

from draft.train import unroll as unroll_module
from draft.train.batches import TrainBatch, collate, generator_for
from draft.train.evaluate import walk
from draft.train.loss import SoftTargets
from draft.train.objective import Objective, target_table
from draft.train.shards import Document
from draft.train.unroll import unroll
from tests.draft.train.tiny import SHAPE, make_head, make_target, random_document
from tests.oracles import unrolled_head as oracle

STEPS = 4


def ragged() -> list[Document]:
    generator = torch.Generator().manual_seed(3)
    return [
        random_document(length, prompt_len, generator)
        for length, prompt_len in ((11, 4), (7, 2), (9, 6), (4, 3))
    ]


def compare(batch: TrainBatch, documents: list[Document], continues: torch.Tensor) -> float:
    """Largest difference between the parallel forward and the oracle, over all chains and steps."""
    head, target = make_head(), make_target()
    weights = dict(head.state_dict())
    worst, compared = 0.0, 0
    with torch.no_grad():
        steps = list(unroll(head, target.embedding, batch, STEPS, continues))
        expected = {
            (d, start): oracle.chain(
                weights,
                SHAPE,
                target.embedding,
                documents[d].tokens.tolist(),
                documents[d].features.double(),
                start,
                STEPS,
            )
            for d, start in batch.loss.nonzero().tolist()
        }
    for step in steps:
        for m, (d, start) in enumerate(zip(step.document.tolist(), step.start.tolist(), strict=True)):
            assert bool(step.exists[m]) == (start + step.step + 2 < documents[d].tokens.shape[0])
            if step.exists[m]:
                worst = max(worst, float((step.hidden[m] - expected[d, start][step.step]).abs().max()))
                compared += 1
    assert compared >= int(batch.loss.sum())
    return worst


def test_unrolled_forward_equals_the_oracle_on_ragged_documents() -> None:
    documents = ragged()
    batch = collate(documents, torch.float64, "cpu")
    assert batch.loss.sum() == sum(int(doc.answer[2:].sum()) for doc in documents)
    assert compare(batch, documents, batch.loss) < 1e-5  # rotation angles are float32


def test_a_random_subset_of_chains_gives_the_same_states() -> None:
    documents = ragged()
    batch = collate(documents, torch.float64, "cpu")
    keep = torch.rand(batch.loss.shape, generator=generator_for(1)) < 0.5
    assert compare(batch, documents, keep) < 1e-5


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_that_shows_one_row_more_or_less_is_noticed(
    monkeypatch: pytest.MonkeyPatch, shift: int
) -> None:
    documents = ragged()
    batch = collate(documents, torch.float64, "cpu")
    original = unroll_module._chains

    def mutant(starts: torch.Tensor, dtype: torch.dtype) -> object:
        chains = original(starts, dtype)
        hidden = torch.arange(starts.shape[1]) > (chains.start + shift).clamp(min=0)[:, None]
        bias = torch.zeros_like(chains.bias).view(-1, starts.shape[1])
        bias[chains.slot] = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
        return unroll_module._Chains(
            chains.document, chains.start, chains.slot, chains.width, bias.view_as(chains.bias)
        )

    monkeypatch.setattr(unroll_module, "_chains", mutant)
    assert compare(batch, documents, batch.loss) > 1e-3


def test_objective_equals_the_oracle() -> None:
    documents = ragged()
    batch = collate(documents, torch.float64, "cpu")
    head, target = make_head(), make_target()
    loss = Objective(STEPS, 0.8, 1.0)(head, target, batch, generator_for(0))
    weights = {name: value.detach() for name, value in head.state_dict().items()}
    sums, counts = [0.0] * STEPS, [0] * STEPS
    for d, doc in enumerate(documents):
        tokens, features = doc.tokens.tolist(), doc.features.double()
        for start in batch.loss[d].nonzero()[:, 0].tolist():
            for k, hidden in enumerate(
                oracle.chain(weights, SHAPE, target.embedding, tokens, features, start, STEPS)
            ):
                row = start + k
                if row + 2 >= len(tokens):
                    break
                counts[k] += 1
                if not head.t2d[tokens[row + 2]]:
                    continue
                normed = oracle.norm(features[row + 1, -16:], target.norm, target.eps)
                probs = (target.head_rows @ normed).softmax(0)
                sums[k] -= float(probs @ oracle.logits(weights, SHAPE, hidden).log_softmax(0))
    expected = sum(0.8**k * sums[k] / counts[k] for k in range(STEPS)) / sum(0.8**k for k in range(STEPS))
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)


def test_gradients_are_right() -> None:
    documents = ragged()[1:]
    batch = collate(documents, torch.float64, "cpu")
    head, target = make_head(), make_target()
    objective = Objective(3, 0.8, 1.0)
    objective(head, target, batch, generator_for(0)).backward()  # type: ignore[no-untyped-call]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name
        direction = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
        with torch.no_grad():
            parameter.add_(direction, alpha=1e-6)
            above = objective(head, target, batch, generator_for(0))
            parameter.sub_(direction, alpha=2e-6)
            below = objective(head, target, batch, generator_for(0))
            parameter.add_(direction, alpha=1e-6)
        assert float((parameter.grad * direction).sum()) == pytest.approx(
            float(above - below) / 2e-6, rel=1e-4, abs=1e-8
        ), name


def test_soft_targets_equal_the_plain_formula() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(
        700, 8, generator=generator, dtype=torch.float64, requires_grad=True
    )  # several blocks
    weight = torch.randn(12, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    table = torch.randn(50, 12, generator=generator, dtype=torch.float64).softmax(-1)
    index = torch.randint(0, 50, (700,), generator=generator)
    scale = torch.rand(700, generator=generator, dtype=torch.float64)
    ours = SoftTargets(table, weight).cross_entropy(hidden, index, scale)
    plain = -((hidden @ weight.t()).log_softmax(-1) * table[index]).sum(-1) @ scale
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (hidden, weight)), torch.autograd.grad(plain, (hidden, weight))
    )


def test_target_table_is_the_target_distribution_of_the_row() -> None:
    document = ragged()[0]
    batch, target = collate([document], torch.float64, "cpu"), make_target()
    table = target_table(target, batch, torch.tensor([[0, 4]]))
    normed = oracle.norm(document.features[5, -16:].double(), target.norm, target.eps)
    torch.testing.assert_close(table[0], (target.head_rows @ normed).softmax(0))


@pytest.mark.parametrize(
    ("runs", "length", "steps"),
    [([], 4, 0), ([0], 4, 1), ([2, 0, 0, 0], 4, 2), ([9] * 10, 4, 2), ([0] * 5, 4, 5), ([9] * 10, 1, 5)],
)
def test_walk_counts_decode_steps(runs: list[int], length: int, steps: int) -> None:
    assert walk(runs, length) == steps
