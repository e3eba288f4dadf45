"""The crowd of ``test_crowd`` on a device whose host reads one step late: whoever comes, leaves, ends or
makes room, in whatever order, gets what it gets alone, and no page is lost or written by strangers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.graphs import Graphs
from tests.engine.rig import make_engine
from tests.engine.test_crowd import EOS, MODEL, OPS, Crowd, Op
from tests.simulated import DEVICE, Simulated, simulated_gpu


@pytest.fixture(scope="module")
def gpu() -> Iterator[Simulated]:
    with pytest.MonkeyPatch.context() as patch, simulated_gpu(patch) as device:
        yield device


class LateCrowd(Crowd):
    """Counts the steps that are launched ahead."""

    num_ahead = 0

    def step(self) -> None:
        super().step()
        self.num_ahead += self.engine._next is not None


def run(gpu: Simulated, draft: str, page_size: int, num_rows: int, budget: int, ops: list[Op]) -> LateCrowd:
    engine = make_engine(
        MODEL,
        draft,
        num_pages=1 + num_rows // page_size,
        page_size=page_size,
        eos=EOS,
        max_num_batched_tokens=budget,
        max_num_seqs=3,
        max_model_len=100,
        device=DEVICE,
        graphs=Graphs(gpu),
    )
    crowd = LateCrowd(draft, engine)
    for op in ops:
        crowd.carry_out(op)
    crowd.finish()
    return crowd


def test_whatever_happens(gpu: Simulated) -> None:
    num_ahead = 0

    @settings(
        max_examples=4,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    @given(
        st.sampled_from(["eagle3", "none"]),
        st.sampled_from([1, 4]),
        st.integers(44, 80),
        st.sampled_from([6, 24]),
        st.lists(OPS, min_size=8, max_size=12),
    )
    def check(draft: str, page_size: int, num_rows: int, budget: int, ops: list[Op]) -> None:
        nonlocal num_ahead
        num_ahead += run(gpu, draft, page_size, num_rows, budget, ops).num_ahead

    check()
    assert num_ahead > 12
