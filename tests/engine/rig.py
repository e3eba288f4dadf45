"""Engines around tiny models, drafts that are often right, and a recorder of what the KV pools held after
each step.

A random head is hardly ever right, so long paths would never be accepted and compaction would never move a
row. Two remedies: ``echo`` models, whose target is nearly a function of the last token and whose heads
compute just that function; and ``Prophet``, a draft that knows the answer and hides it in a random tree.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from draft.eagle import EagleModel
from draft.eagle3 import Eagle3Model
from draft.head import FeatureDraft
from draft.ngram import NgramDraft
from draft.none import NoDraft, Unplanned
from draft.planner import Planner
from engine.config import POST_NORM, EngineConfig, LlamaConfig
from engine.core import Batch, DraftTree, Request, SamplingParams, Speculation, Verdict
from engine.core import Sequence as Seq
from engine.graphs import Graphs
from engine.models.llama import Llama
from engine.models.mistral4 import Mistral4
from engine.pages import PagePool
from engine.penalties import Penalties
from engine.roles import Draft, DraftMask
from engine.step import Completion, Engine
from engine.text.grammar import GrammarCompiler
from tests.conftest import layer_weights, matrix, norm_weight, tiny_eagle3, tiny_llama

PLAIN = Speculation(1, 0, 1)
CHAIN = Speculation(5, 4, 1)
TREE = Speculation(8, 4, 3)
FEATURE_LAYERS = (0, 1, 2)


@dataclass(frozen=True)
class Model:
    """A target and the heads made for it; weights by published names."""

    config: LlamaConfig
    weights: dict[str, Tensor]
    eagle3_config: LlamaConfig
    eagle3: dict[str, Tensor]
    eagle_config: LlamaConfig
    eagle: dict[str, Tensor]


def random_model(
    seed: int = 0,
    *,
    eagle_layers: int = 1,
    norm: bool = False,
    bias: bool = False,
    input_norm: bool = False,
    draft_vocab_size: int = 61,
    **overrides: Any,
) -> Model:
    """All weights random; norm, bias and input_norm say which optional tensors the EAGLE-1 head has."""
    config, weights = tiny_llama(seed, **overrides)
    raw, eagle3 = tiny_eagle3(config, seed, draft_vocab_size)
    generator = torch.Generator().manual_seed(2000 + seed)
    hidden = config.hidden_size
    eagle = {"fc.weight": matrix(generator, hidden, 2 * hidden)}
    if bias:
        eagle["fc.bias"] = torch.randn(hidden, generator=generator)
    if norm:
        eagle["norm.weight"] = norm_weight(generator, hidden)
    for i in range(eagle_layers):
        if input_norm:
            eagle[f"layers.{i}.input_layernorm.weight"] = norm_weight(generator, hidden)
        eagle |= layer_weights(generator, config, f"layers.{i}.", hidden)
    return Model(
        config,
        weights,
        dataclasses.replace(config, num_layers=1, vocab_size=raw["draft_vocab_size"]),
        eagle3,
        dataclasses.replace(config, num_layers=eagle_layers),
        eagle,
    )


def echo_model(seed: int = 0, gain: float = 0.35) -> Model:
    """A target whose layers add ``gain`` to the embedding, and heads that compute the target without them.

    The EAGLE-1 head passes the embedding through and adds little to it. The EAGLE-3 head's residual stream
    starts at its feature, which does not know the last token yet, so there attention brings the embedding in:
    sharp queries find their own row. Both still read their features a little, or the state oracle would not
    see wrong ones.
    """
    model = random_model(seed, norm=True, num_kv_heads=4, draft_vocab_size=90)
    hidden, num_layers = model.config.hidden_size, model.config.num_layers
    weights = {
        name: tensor * (gain if "o_proj" in name or "down_proj" in name else 1.0)
        for name, tensor in model.weights.items()
    }
    eye, nothing = torch.eye(hidden), torch.zeros(hidden, hidden)
    eagle = {
        name: tensor * (0.15 if "o_proj" in name or "down_proj" in name else 1.0)
        for name, tensor in model.eagle.items()
    }
    eagle |= {
        "fc.weight": torch.cat((eye, 0.2 * model.eagle["fc.weight"][:, hidden:]), 1),
        "norm.weight": weights["model.norm.weight"],
    }
    eagle3 = dict(model.eagle3)
    ids = torch.arange(len(eagle3["d2t"])) + eagle3["d2t"]
    sharp = torch.cat((2.5 * eye, nothing), 1)
    eagle3 |= {
        "fc.weight": 0.02 * eagle3["fc.weight"],
        "midlayer.input_layernorm.weight": torch.ones(hidden),
        "norm.weight": weights["model.norm.weight"],
        "midlayer.self_attn.q_proj.weight": sharp,
        "midlayer.self_attn.k_proj.weight": sharp,
        "midlayer.self_attn.v_proj.weight": torch.cat((eye, 0.1 * eye), 1),
        "midlayer.self_attn.o_proj.weight": eye,
        "midlayer.mlp.down_proj.weight": 0.05 * eagle3["midlayer.mlp.down_proj.weight"],
        "lm_head.weight": weights["lm_head.weight"][ids],
    }
    assert num_layers == len(FEATURE_LAYERS)
    return dataclasses.replace(model, weights=weights, eagle=eagle, eagle3=eagle3)


def copies(
    weights: dict[str, Tensor], dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> dict[str, Tensor]:
    """The engine consumes the dict it is given. dtype: of what is not a table of token ids."""
    return {
        name: tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in weights.items()
    }


def make_engine(
    model: Model,
    draft: str | Draft = "none",
    *,
    speculation: Speculation = TREE,
    num_pages: int = 120,
    page_size: int = 4,
    max_num_batched_tokens: int = 96,  # room for large trees; few, and prompts are chunked and trees cut
    max_num_seqs: int = 8,
    max_model_len: int = 200,
    eos: tuple[int, ...] = (),
    shared_noise: bool = True,
    half_weights: bool = False,
    prefix_caching: bool = True,
    planner: Planner | None = None,
    canary: float = 0.0,
    dtype: torch.dtype = torch.float32,
    grammar_compiler: GrammarCompiler | None = None,
    device: str = "cpu",
    graphs: Graphs | None = None,
) -> Engine:
    """draft: "none", "ngram", "eagle3", "eagle" or an object; planner: of a head."""
    config = EngineConfig(
        device=device,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        page_size=page_size,
        max_num_seqs=max_num_seqs,
        speculation=speculation,
        planned=planner is not None,
        half_weights=half_weights,
        prefix_caching=prefix_caching,
        canary=canary,
        dtype=dtype,
    )
    layers = (
        {"eagle3": FEATURE_LAYERS, "eagle": (POST_NORM,)}.get(draft, ()) if isinstance(draft, str) else ()
    )
    num_slots = num_pages * page_size
    proposer: Draft
    target = Llama(model.config, copies(model.weights, dtype, device), num_slots, layers, half_weights)
    if draft == "eagle3":
        head3 = Eagle3Model(
            model.eagle3_config,
            {n: t for n, t in copies(model.eagle3, dtype, device).items() if n != "t2d"},
            target.embedding,
            FEATURE_LAYERS,
            num_slots,
        )
        proposer = FeatureDraft(head3, "eagle3", shared_noise=shared_noise, planner=planner, graphs=graphs)
    elif draft == "eagle":
        head = EagleModel(
            model.eagle_config, copies(model.eagle, dtype, device), target.embedding, target.logits, num_slots
        )
        proposer = FeatureDraft(head, "eagle", shared_noise=shared_noise, planner=planner, graphs=graphs)
    elif isinstance(draft, str):
        proposer = NgramDraft() if draft == "ngram" else NoDraft()
    else:
        proposer = draft
    return Engine(
        config,
        target,
        proposer,
        PagePool(num_pages, page_size),
        eos,
        grammar_compiler=grammar_compiler,
        graphs=graphs,
    )


def prompts_of(lengths: Sequence[int], seed: int = 1, vocab_size: int = 97) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in lengths]


def assert_idle(engine: Engine) -> None:
    """Nothing runs, every page is free or cached, and draft and sampler have forgotten everyone."""
    assert not engine.has_work
    pages = engine.scheduler.pages
    assert pages.num_free + pages.num_cached == pages.num_usable
    assert engine.scheduler.prefixes._trails == {}
    edits = engine.sampler._edits
    assert edits._asked == {}
    for edit in edits._edits:
        kept = "_counts" if isinstance(edit, Penalties) else "_places" if edit is engine.grammars else "_kept"
        assert getattr(edit, kept) == {}
    if isinstance(engine.draft, FeatureDraft):
        assert engine.draft._pending == {}
        assert engine.draft.lookup._states == {}
        assert engine.draft.coverage._counted == {}
    elif isinstance(engine.draft, NgramDraft):
        assert engine.draft._indexes == {}


def plain_tokens(
    model: Model, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **kwargs: Any
) -> list[tuple[int, ...]]:
    """Each prompt alone, without speculation."""
    return [
        make_engine(model, **kwargs).generate([prompt], param)[0].token_ids
        for prompt, param in zip(prompts, params, strict=True)
    ]


_KNOWN: dict[tuple[Any, ...], tuple[Model, tuple[int, ...]]] = {}


def known_plain_tokens(
    model: Model, prompts: Sequence[Sequence[int]], params: Sequence[SamplingParams], **kwargs: Any
) -> list[tuple[int, ...]]:
    """As ``plain_tokens``, but what was run before is remembered: many drafts are compared with one plain
    run. Not for tests that break the engine. The model is kept, so that its id stays its own."""
    found = []
    for prompt, param in zip(prompts, params, strict=True):
        key = (id(model), tuple(prompt), param, *sorted(kwargs.items()))
        if key not in _KNOWN:
            _KNOWN[key] = model, plain_tokens(model, [prompt], [param], **kwargs)[0]
        found.append(_KNOWN[key][1])
    return found


# --- a draft that knows the answer ----------------------------------------------------------------


class Prophet(Unplanned):
    """A draft (roles.Draft) that hides the true continuation in a random tree.

    answers: by request id, what plain decoding emits. Node order, wrong siblings, wrong descendants and the
    length of the true path are random; trees of a batch differ in size.
    """

    def __init__(self, answers: dict[int, tuple[int, ...]], vocab_size: int, seed: int = 0) -> None:
        self._answers, self._vocab_size, self._random = answers, vocab_size, random.Random(seed)

    rows = None

    def vocab_coverage(self) -> float | None:
        return None

    def scratch_rows(self, speculation: Speculation) -> int:
        return 0 if speculation.is_off else speculation.nodes - 1

    def propose(self, batch: Batch, mask: DraftMask | None = None) -> DraftTree:
        trees = [self._tree(seq, spec) for seq, spec in zip(batch.seqs, batch.speculation, strict=True)]
        width = max(len(tokens) for tokens, _ in trees)
        return DraftTree(
            torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in trees]),
            torch.tensor([parents + [-1] * (width - len(parents)) for _, parents in trees]),
        )

    def _tree(self, seq: Seq, spec: Speculation) -> tuple[list[int], list[int]]:
        tokens, parents, depths = [seq.tokens[-1]], [-1], [0]
        if spec.is_off:
            return tokens, parents
        truth = list(self._answers[seq.request.id][seq.num_generated :])[: spec.depth]
        on_path = [0]  # nodes of the true path so far
        for _ in range(self._random.randint(1, spec.nodes - 1)):
            known = len(on_path) - 1
            if known < len(truth) and self._random.random() < 0.6:
                parent, token = on_path[-1], truth[known]
                on_path.append(len(tokens))
            else:
                parent = self._random.choice(
                    [node for node, depth in enumerate(depths) if depth < spec.depth]
                )
                token = self._random.randrange(self._vocab_size)
                taken = {tokens[node] for node in range(len(tokens)) if parents[node] == parent}
                if parent in on_path and depths[parent] < len(truth):
                    taken.add(truth[depths[parent]])
                if token in taken:
                    continue
            tokens.append(token)
            parents.append(parent)
            depths.append(depths[parent] + 1)
        return tokens, parents

    def observe(self, batch: Batch, tree: DraftTree, verdict: Verdict, features: Tensor) -> None:
        pass

    def forget(self, seq: Seq) -> None:
        pass


# --- what the pools held --------------------------------------------------------------------------


@dataclass(frozen=True)
class Snapshot:
    """One sequence after one step. Tensors [layers, 2, Hkv, rows, D]; the head's rows start at row 1."""

    request_id: int
    tokens: tuple[int, ...]
    target_rows: Tensor
    head_rows: Tensor | None


@dataclass(frozen=True)
class Recording:
    completions: list[Completion]
    snapshots: list[Snapshot]


def slots_of_pages(pages: Sequence[int], page_size: int, first: int, end: int) -> Tensor:
    """Slots of rows first..end-1, one by one."""
    return torch.tensor(
        [pages[row // page_size] * page_size + row % page_size for row in range(first, end)],
        dtype=torch.int64,
    )


def pool_rows(engine: Engine) -> Tensor:
    """The KV rows of an engine's target."""
    assert isinstance(engine.target, Llama | Mistral4)
    return engine.target.pool.rows


def snapshots(engine: Engine) -> list[Snapshot]:
    """What the pools hold now for every running sequence."""
    found = []
    page_size = engine.scheduler.pages.page_size
    for seq in engine.scheduler.running:
        rows = pool_rows(engine)[:, :, :, slots_of_pages(seq.pages, page_size, 0, seq.kv_len)].clone().cpu()
        head_rows = None
        if isinstance(engine.draft, FeatureDraft) and seq.request.id in engine.draft._pending:
            pending = engine.draft._pending[seq.request.id]
            assert pending.num_rows + pending.num_waiting == len(seq.tokens) - 1, (
                "the head lags by its pending pairs"
            )
            assert pending.tokens == seq.tokens[1 + pending.num_rows :], "a pair holds the wrong token"
            slots = slots_of_pages(seq.pages, page_size, 1, pending.num_rows + 1)
            head_rows = engine.draft.model.pool.rows[:, :, :, slots].clone().cpu()
        found.append(Snapshot(seq.request.id, tuple(seq.tokens), rows, head_rows))
    return found


def record(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    params: Sequence[SamplingParams],
    speculation: Sequence[Speculation | None] | None = None,
    after_step: Callable[[Engine], None] | None = None,
    arrivals: Sequence[int] | None = None,
) -> Recording:
    """Generate and keep what the pools held after every step. arrivals: the step before which each request is
    added, the first if None."""
    kept: list[Snapshot] = []
    specs = speculation or [None] * len(prompts)
    requests = [
        Request(i, tuple(prompt), param, spec)
        for i, (prompt, param, spec) in enumerate(zip(prompts, params, specs, strict=True))
    ]
    coming = sorted(zip(arrivals or [0] * len(requests), requests, strict=True), key=lambda pair: pair[0])
    emitted: dict[int, list[int]] = {request.id: [] for request in requests}
    drafted, accepted, steps = [0] * len(requests), [0] * len(requests), [0] * len(requests)
    reasons: dict[int, Any] = {}
    step = 0
    while engine.has_work or coming:
        while coming and coming[0][0] <= step:
            engine.add(coming.pop(0)[1])
        step += 1
        for delta in engine.step():
            emitted[delta.request_id] += delta.token_ids
            drafted[delta.request_id] += delta.num_draft_tokens
            accepted[delta.request_id] += delta.num_accepted
            steps[delta.request_id] += delta.is_decode
            if delta.finish_reason is not None:
                reasons[delta.request_id] = delta.finish_reason
        kept += snapshots(engine)
        if after_step is not None:
            after_step(engine)
    return Recording(
        [
            Completion(
                request.prompt,
                tuple(emitted[request.id]),
                reasons[request.id],
                steps[request.id],
                max(len(emitted[request.id]) - 1, 0),
                drafted[request.id],
                accepted[request.id],
            )
            for request in requests
        ],
        kept,
    )
