"""What the tests of edits share: requests that edit their logits, and the same edits written out."""

from __future__ import annotations

from hypothesis import strategies as st
from torch import Tensor

from engine.core import SamplingParams
from tests.engine.rig import Model, echo_model, prompts_of
from tests.oracles import sampler

VOCAB, EOS = 97, (96, 95)
PROMPTS = prompts_of([9, 2, 21])
MODEL: Model = echo_model(3)


def written_out(logits: Tensor, prompt: list[int], answer: list[int], params: SamplingParams) -> sampler.Row:
    return sampler.edit(
        logits.double().numpy(),
        prompt,
        answer,
        ends=EOS + params.stop_token_ids,
        min_tokens=params.min_tokens,
        bad_words=params.bad_words,
        logit_bias=params.logit_bias,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
    )


def params_strategy(tokens: st.SearchStrategy[int]) -> st.SearchStrategy[SamplingParams]:
    """Any mixture; edits concern the given tokens."""
    return st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.0, 0.0, 0.6, 1.0]),
        top_k=st.sampled_from([0, 0, 20]),
        top_p=st.sampled_from([1.0, 0.9]),
        min_p=st.sampled_from([0.0, 0.0, 0.05]),
        seed=st.integers(0, 1000),
        presence_penalty=st.sampled_from([0.0, 0.0, 1.5, -2.0]),
        frequency_penalty=st.sampled_from([0.0, 0.0, 0.7, -0.3]),
        repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -2.5, 3.0]), max_size=3).map(
            lambda found: tuple(found.items())
        ),
        bad_words=st.lists(st.lists(tokens, min_size=1, max_size=4).map(tuple), max_size=4).map(tuple),
        min_tokens=st.sampled_from([0, 0, 3, 9]),
        max_tokens=st.just(14),
        stop_token_ids=st.lists(tokens, max_size=2).map(tuple),
        ignore_eos=st.booleans(),
    )
