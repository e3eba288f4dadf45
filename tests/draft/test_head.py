"""What a head keeps between steps: pending pairs, and for whom."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from draft.head import FeatureDraft
from engine.core import Batch, DraftTree, PromptChunk, Request, SamplingParams, Sequence, Speculation, Verdict
from engine.sampler import sampling_tensors
from tests.engine.rig import CHAIN, PLAIN, TREE, Model, assert_idle, make_engine, prompts_of, random_model

MODEL: Model = random_model(1)


@pytest.fixture
def draft() -> FeatureDraft:
    made = make_engine(MODEL, "eagle").draft
    assert isinstance(made, FeatureDraft)
    return made


def batch_of(tokens: list[list[int]], specs: list[Speculation], prompt: PromptChunk | None = None) -> Batch:
    seqs = tuple(
        Sequence(Request(i, (0,), SamplingParams(temperature=0)), t, [], [1 + 9 * i + n for n in range(9)])
        for i, t in enumerate(tokens)
    )
    return Batch(
        seqs,
        torch.tensor([seq.kv_len for seq in seqs]),
        torch.tensor([seq.pages for seq in seqs]),
        4,
        sampling_tensors([seq.request.sampling for seq in seqs], "cpu"),
        tuple(specs),
        prompt,
    )


def features(count: int) -> Tensor:
    """[1, count, H]: feature i is full of i, so that it is recognised."""
    return torch.arange(count).float()[None, :, None].expand(1, -1, MODEL.config.hidden_size)


def test_the_example_of_the_module(draft: FeatureDraft) -> None:
    """Token 5 is the root, nodes 1 and 3 are accepted: three pairs wait, each feature with the next token."""
    batch = batch_of([[10, 11, 12, 13, 14, 15]], [TREE])
    draft.resume(batch.seqs[0])
    assert draft.num_rows(batch.seqs[0]) == 6
    tree = DraftTree(torch.tensor([[15, 16, 99, 17]]), torch.tensor([[-1, 0, 0, 1]]))
    draft.observe(
        batch,
        tree,
        Verdict(torch.tensor([[0, 1, 3, -1]]), torch.tensor([3]), torch.tensor([18])),
        features(4),
    )
    pending = draft._pending[0]
    assert pending.num_waiting == 3
    tokens, kept = pending.take(2)
    assert tokens == [16, 17]
    assert kept[:, 0].tolist() == [0, 1]
    assert (pending.num_rows, pending.num_waiting) == (7, 1)
    tokens, kept = pending.take(1)
    assert tokens == [18]
    assert kept[:, 0].tolist() == [3]
    assert (pending.num_rows, pending.num_waiting) == (8, 0)


def test_a_chunk_of_a_prompt_is_extended_at_once_but_for_its_last_pair(draft: FeatureDraft) -> None:
    chunk = PromptChunk(torch.tensor([[7, 8, 9]]), torch.tensor([3]), torch.tensor([5]), (3,))
    batch = batch_of([[7]], [TREE], chunk)
    batch.seqs[0].forced = [8, 9, 5, 6]
    tree = DraftTree(chunk.tokens, torch.tensor([[-1, 0, 1]]))
    draft.observe(
        batch, tree, Verdict(torch.tensor([[0, 1, 2]]), torch.tensor([3]), torch.tensor([5])), features(3)
    )
    assert (draft._pending[0].num_rows, draft._pending[0].num_waiting) == (2, 1)
    last = PromptChunk(torch.tensor([[5, 6]]), torch.tensor([2]), torch.tensor([-1]), (2,))
    batch = batch_of([[7, 8, 9, 5]], [TREE], last)
    batch.seqs[0].forced = [6]
    tree = DraftTree(last.tokens, torch.tensor([[-1, 0]]))
    draft.observe(
        batch, tree, Verdict(torch.tensor([[0, 1]]), torch.tensor([2]), torch.tensor([4])), features(2)
    )
    assert (draft._pending[0].num_rows, draft._pending[0].num_waiting) == (
        2,
        3,
    )  # waits until the first token is out


def test_a_request_without_speculation_costs_nothing(draft: FeatureDraft) -> None:
    batch = batch_of([[2], [4]], [PLAIN, CHAIN])
    tree = DraftTree(torch.tensor([[2], [4]]), torch.tensor([[-1], [-1]]))
    verdict = Verdict(torch.tensor([[0], [0]]), torch.tensor([1, 1]), torch.tensor([5, 6]))
    draft.observe(batch, tree, verdict, features(1).expand(2, -1, -1))
    assert list(draft._pending) == [1]
    assert (draft.num_rows(batch.seqs[0]), draft.num_rows(batch.seqs[1])) == (None, 1)
    draft.forget(batch.seqs[1])
    draft.forget(batch.seqs[0])  # nothing to forget
    assert draft._pending == {}


def test_a_head_cannot_begin_in_the_middle(draft: FeatureDraft) -> None:
    """Speculation that starts after the first step, for want of pages or by choice: the rows before it are
    missing."""
    batch = batch_of([[1, 2]], [CHAIN])
    tree = DraftTree(torch.tensor([[2]]), torch.tensor([[-1]]))
    draft.observe(
        batch, tree, Verdict(torch.tensor([[0]]), torch.tensor([1]), torch.tensor([5])), features(1)
    )
    assert draft._pending == {}


def test_scratch_rows(draft: FeatureDraft) -> None:
    """The tree's own nodes for the target, or the nodes run while growing for the head, whichever is more."""
    assert [
        draft.scratch_rows(s)
        for s in (PLAIN, Speculation(8, 0, 4), Speculation(8, 4, 1), Speculation(8, 4, 4))
    ] == [0, 0, 7, 12]


def test_without_pending_pairs_only_the_root_is_proposed(draft: FeatureDraft) -> None:
    """A prompt of one token has no pair before its first step."""
    tree = draft.propose(batch_of([[42]], [TREE]))
    assert (tree.tokens.tolist(), tree.parents.tolist(), tree.scores) == ([[42]], [[-1]], None)


def test_a_long_prompt_waits_in_pieces() -> None:
    """More pending pairs than are extended in one padded pass with others."""
    prompts = prompts_of([150, 3])
    params = SamplingParams(temperature=0, max_tokens=6)
    plain = make_engine(MODEL, max_num_batched_tokens=200).generate(prompts, params)
    engine = make_engine(MODEL, "eagle3", max_num_batched_tokens=200)
    assert [c.token_ids for c in engine.generate(prompts, params)] == [c.token_ids for c in plain]
    assert_idle(engine)


def test_trees_of_some_sequences_keep_their_place(draft: FeatureDraft) -> None:
    """Sequences 0 and 2 speculate, 1 does not: its row is the root and padding."""
    batch = batch_of([[1, 2], [3, 4], [5, 6]], [TREE, PLAIN, CHAIN])
    tree = DraftTree(torch.tensor([[2], [4], [6]]), torch.full((3, 1), -1))
    first = batch_of([[1], [3], [5]], [TREE, PLAIN, CHAIN])
    verdict = Verdict(
        torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, dtype=torch.int64), torch.tensor([2, 4, 6])
    )
    draft.observe(first, tree, verdict, torch.randn(3, 1, MODEL.config.hidden_size))
    tree = draft.propose(batch)
    assert tree.tokens[:, 0].tolist() == [2, 4, 6]
    assert tree.real().sum(1).tolist() == [8, 1, 5]
    assert tree.parents[1].tolist() == [-1] * 8
    assert tree.scores is not None
    assert tree.scores.value[1].tolist() == [1] + [0] * 7
    assert bool((tree.scores.value[:, 0] == 1).all())


def test_coverage_counts_what_a_head_could_have_drafted() -> None:
    """Tokens after the first, of requests that speculate, whether they were drafted or not."""
    engine = make_engine(MODEL, "eagle3", speculation=TREE)
    assert engine.vocab_coverage() is None
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40)
    done = engine.generate(prompts_of([5, 9]), params)
    engine.generate(prompts_of([4]), params, PLAIN)
    assert isinstance(engine.draft, FeatureDraft)
    known = set(engine.draft.model.token_ids.tolist())
    emitted = [token for completion in done for token in completion.token_ids[1:]]
    assert engine.draft.coverage.emitted == len(emitted)
    share = sum(token in known for token in emitted) / len(emitted)
    assert 0 < share < 1
    assert engine.vocab_coverage() == share
    assert make_engine(MODEL, "ngram", speculation=TREE).vocab_coverage() is None


def test_a_sequence_at_the_end_of_its_context_beside_a_deep_tree() -> None:
    """It has no rows at the others' depths, and no positions either: tables end with the context."""
    model = random_model(1, max_position_embeddings=40)
    long, short = prompts_of([34, 3])
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (6, 12)]
    alone = [
        make_engine(model, max_model_len=40).generate([prompt], param)[0].token_ids
        for prompt, param in zip((long, short), params, strict=True)
    ]
    for draft in ("eagle", "eagle3"):
        engine = make_engine(
            model, draft, max_model_len=40, max_num_batched_tokens=200, speculation=Speculation(64, 12, 2)
        )
        assert [c.token_ids for c in engine.generate([long, short], params)] == alone
