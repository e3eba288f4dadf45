"""The compiled choice of tokens against the reference: the filters, the noise, ties and long rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import cpu_choose, gumbel_noise, ref
from kernels import dispatch as ops

KERNEL = cpu_choose.choose_kernel()
needs_compiler = pytest.mark.skipif(KERNEL is None, reason="no C compiler")


def compiled(*given: Tensor | None) -> Tensor:
    assert KERNEL is not None
    return cpu_choose.choose(KERNEL, *given)  # type: ignore[arg-type]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Tensor, ...]:
    """Arguments of the operation, with every mix of filters in one batch."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    num_seqs, num_nodes = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    vocab_size = draw(st.sampled_from([1, 5, 31, 32, 33, 200, 3000]))
    shape = num_seqs, num_nodes

    def chosen_from(values: list[float], *of: int) -> Tensor:
        return torch.tensor(values)[torch.randint(len(values), of, generator=generator)]

    logits = torch.randn(*shape, vocab_size, generator=generator) * draw(st.sampled_from([0.01, 1.0, 5.0]))
    if draw(st.booleans()):
        logits = logits.round()  # ties
    if draw(st.booleans()):
        logits[..., 1::2] = float("-inf")
    temperature = chosen_from([0.0, 1e-5, 0.3, 1.0, 100.0], num_seqs)
    least = torch.quantile(logits.clamp(min=-50), draw(st.sampled_from([0.0, 0.5, 0.95])), dim=-1)
    floors = least / torch.where(temperature == 0, 1.0, temperature)[:, None]
    return (
        logits,
        torch.randint(2**40, shape, generator=generator),
        temperature,
        chosen_from([1e-6, 0.3, 0.9, 1.0], num_seqs),
        torch.where(chosen_from([0.0, 1.0], *shape) > 0, floors, float("-inf")),
        torch.randint(-(2**62), 2**62, (num_seqs,), generator=generator),
    )


@needs_compiler
@settings(deadline=None, max_examples=150)
@given(rows(), st.sampled_from([1, 3]))
def test_against_the_reference(given: tuple[Tensor, ...], threads: int) -> None:
    expected, before = ref.choose(*given), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = compiled(*given)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, expected)
    logits, positions, temperature, top_p, _, seeds = given
    without = (logits, positions, temperature, top_p, None, seeds)
    assert torch.equal(compiled(*without), ref.choose(*without))


@needs_compiler
@pytest.mark.parametrize("vocab_size", [49_152, 131_073])
def test_long_rows(vocab_size: int) -> None:
    """Where a token is worth little, only the largest noise of all lets it win."""
    for spread in (0.0, 0.5, 3.0):
        logits = torch.randn(2, 3, vocab_size, generator=torch.Generator().manual_seed(1)) * spread
        positions, seeds = torch.arange(6).view(2, 3), torch.tensor([4, -9])
        noise = gumbel_noise(seeds, positions, torch.arange(vocab_size))
        found = compiled(logits, positions, torch.ones(2), torch.ones(2), None, seeds)
        assert torch.equal(found, (logits + noise).argmax(-1))


@needs_compiler
def test_of_equals_the_lowest() -> None:
    """Wherever in its vector, its block or the end behind the blocks a tie begins."""
    given = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1), torch.ones(1), None, torch.zeros(1).long()
    for first in range(70):
        for second in range(first, 70):
            logits = torch.zeros(1, 1, 70)
            logits[..., [first, second]] = 1.0
            assert compiled(logits, *given).item() == first
    assert compiled(torch.zeros(1, 1, 70), *given).item() == 0


@needs_compiler
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("top_p", [0.5, 1.0])
def test_a_row_that_says_nothing_has_no_choice(temperature: float, top_p: float) -> None:
    """-1 where there is NaN or infinity, wherever in the row it is, or nothing but -infinity."""
    zero = torch.zeros(1, dtype=torch.int64)
    options = torch.tensor([temperature]), torch.tensor([top_p])
    for bad in (float("nan"), float("inf"), float("-inf")):
        for place in (0, 20, 48, 49):
            for logits in (torch.full((1, 1, 50), bad), torch.arange(50.0).view(1, 1, 50)):
                logits[0, 0, place] = bad
                given = logits, zero[None], *options, None, zero
                found = compiled(*given).item()
                assert found == ref.choose(*given).item()
                assert (found == -1) == (bad != float("-inf") or bool(logits.isneginf().all()))


def test_rows_that_do_not_lie_in_a_row_take_the_reference() -> None:
    logits = torch.randn(1, 1, 40, generator=torch.Generator().manual_seed(3)).expand(1, 5, -1)
    given = torch.arange(5)[None], torch.ones(1), torch.tensor([0.9]), None, torch.tensor([3])
    assert torch.equal(ops.choose(logits, *given), ref.choose(logits.contiguous(), *given))
    assert torch.equal(ops.choose(logits.contiguous(), *given), ref.choose(logits, *given))


@needs_compiler
def test_the_edge_of_the_nucleus() -> None:
    """A thousandth of the mass below and above each token's share of what is better than it."""
    probs = torch.softmax(0.75 ** torch.arange(10) * 3, dim=0)
    logits = probs.log().expand(1, 3000, -1).contiguous()
    given = torch.arange(3000)[None], torch.ones(1)
    for place, better in enumerate(probs.cumsum(0)[:-1].tolist(), start=1):
        for top_p, num_kept in ((better - 1e-3, place), (better + 1e-3, place + 1)):
            found = compiled(logits, *given, torch.tensor([top_p]), None, torch.tensor([6]))
            assert set(found[0].tolist()) == set(range(num_kept))


@needs_compiler
@settings(deadline=None, max_examples=100)
@given(
    num_rows=st.integers(1, 3),
    vocab_size=st.sampled_from([1, 5, 32, 33, 200, 3000]),
    count=st.integers(1, 16),
    scale=st.sampled_from([0.01, 1.0, 5.0]),
    seed=st.integers(0, 1000),
)
def test_the_best_few_against_the_reference(
    num_rows: int, vocab_size: int, count: int, scale: float, seed: int
) -> None:
    """Of equal ones the first comes first, where the reference promises no order."""
    draws = torch.randn(2, num_rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale
    count = min(count, vocab_size)
    for logits in draws:
        values, columns, mass = ops.best(logits, count)
        expected = ref.best(logits, count)
        assert torch.equal(values, expected[0])
        assert torch.equal(logits.gather(-1, columns), values)
        torch.testing.assert_close(mass, expected[2], rtol=1e-5, atol=1e-5)
    tied = draws[0].round().clamp(min=0)
    columns = ops.best(tied, count)[1]
    assert torch.equal(columns, tied.sort(dim=-1, descending=True, stable=True).indices[:, :count])


@needs_compiler
def test_what_is_not_a_number_is_never_among_the_best() -> None:
    logits = torch.arange(40.0)[None]
    logits[0, 39] = float("nan")
    assert ops.best(logits, 2)[1].tolist() == [[38, 37]]
    values, _, mass = ops.best(torch.full((1, 40), float("-inf")), 3)
    assert values.isneginf().all()
    assert mass.isneginf().all()
