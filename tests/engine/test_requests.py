"""Requests that could never run are refused by the engine itself, whoever sends them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from engine.core import Request, SamplingParams, Speculation
from engine.errors import ContextLengthError, RequestError
from tests.engine.rig import assert_idle, make_engine, random_model


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"prompt": ()}, "prompt"),
        ({"prompt": (3, 97)}, "prompt"),
        ({"prompt": (3, -1)}, "prompt"),
        ({"temperature": -0.5}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e-42}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": float("nan")}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"seed": 2**63}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"logit_bias": ((97, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((-1, 1.0),)}, "logit_bias"),
        ({"logit_bias": ((5, float("nan")),)}, "logit_bias"),
        ({"logit_bias": ((5, float("inf")),)}, "logit_bias"),
        ({"logit_bias": tuple((5, 1.0) for _ in range(301))}, "logit_bias"),
        ({"bad_words": ((),)}, "bad_words"),
        ({"bad_words": ((3, 97),)}, "bad_words"),
        ({"bad_words": ((3,) * 65,)}, "bad_words"),
        ({"bad_words": ((3,),) * 257}, "bad_words"),
        ({"stop_token_ids": (97,)}, "stop_token_ids"),
        ({"stop_token_ids": (1,) * 129}, "stop_token_ids"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 5}, "min_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"speculation": Speculation(8, 4, 0)}, "speculation"),
        ({"speculation": Speculation(1000, 4, 4)}, "speculation"),
        ({"priority": 2**31}, "priority"),
        ({"cache_salt": "x" * 129}, "cache_salt"),
        ({"cache_salt": "a b"}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
    ],
)
def test_a_bad_field_is_named(change: dict[str, Any], param: str) -> None:
    engine = make_engine(random_model(), "eagle3")
    request = Request(0, (1, 2, 3), SamplingParams(max_tokens=4))
    ours = {
        key: value
        for key, value in change.items()
        if key in ("prompt", "speculation", "priority", "cache_salt")
    }
    sampling = dataclasses.replace(request.sampling, **{k: v for k, v in change.items() if k not in ours})
    with pytest.raises(RequestError) as caught:
        engine.add(dataclasses.replace(request, sampling=sampling, **ours))
    assert caught.value.param == param
    assert not engine.has_work


def test_one_bad_prompt_leaves_nothing_behind() -> None:
    engine = make_engine(random_model(), "eagle3")
    params = SamplingParams(temperature=0, max_tokens=5)
    with pytest.raises(ContextLengthError, match="200"):
        engine.generate([[1, 2, 3], [1] * 300], params)
    assert_idle(engine)
    assert len(engine.generate([[1, 2, 3]], params)[0].token_ids) == 5


def test_the_whole_cache_can_be_used() -> None:
    """A request that fits is never refused for its tree: at the end of the memory the root is decoded
    alone."""
    model = random_model()
    engine = make_engine(model, "eagle3", num_pages=11, max_model_len=40)  # ten pages of four rows
    params = SamplingParams(temperature=0, max_tokens=37, ignore_eos=True)
    found = engine.generate([[1, 2, 3]], params, Speculation(30, 5, 6))[0]
    expected = make_engine(model, "none").generate([[1, 2, 3]], params)[0]
    assert found.token_ids == expected.token_ids
    assert len(found.token_ids) == 37
    assert_idle(engine)
