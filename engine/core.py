"""The types every room of haast speaks, and the promises between them. Who speaks them: ``engine.roles``.

A *step* proposes a tree of draft tokens for every sequence, scores the trees with the target in one forward,
chooses the target's own token after every node, accepts the path on which draft and choice agree, and commits
it. Prefill is a chain that is accepted in advance, plain decoding is a tree of one node: one path, three
uses. A step has up to two batches, its decodes and its chunks of prompts; only the forward sees both at once.

Invariants
 1. ``kv_len == len(tokens) - 1`` for the target after every step. The head lags by its pending features, no
    more.
 2. KV rows at or past ``kv_len`` are scratch. A step writes node i at row ``kv_len + i``; ``compact`` moves
    the accepted rows first. Nothing is rolled back.
 3. Target and head share slots and page table; only the pool differs. The head's row i is f(embedding of
    token i, feature i - 1); its row 0 does not exist.
 4. Pages for all nodes are reserved in ``next_batches``, the surplus returned in ``commit``. Between the two
    nothing allocates.
 5. ``parents[i] < i`` and siblings are distinct, so the accepted path is unique and increasing; compaction
    gathers before it scatters.
 6. The noise for position p depends on (seed, p) alone, and target and draft use the same noise.
 7. Every tensor-parallel rank sees the same gathered logits and noise, so each computes the same Verdict.
 8. Idle means: free pages + cached pages == all pages. At any time, free + cached + held == all.
 9. A page that can be found in the prefix cache holds committed rows only, and nobody writes to it.

Letters in shapes: B sequences of a batch, N nodes of a tree (root included), R scored rows, V vocabulary,
F width of the features, L KV rows read, P pages of the longest sequence.
This module imports torch only; it holds no behaviour beyond what follows from a type's own fields.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

FinishReason = Literal["stop", "length", "abort", "error"]

NO_CHOICE = -1  # in place of a token where there is none to choose: see ``Sampler``


@dataclass(frozen=True, slots=True)
class Speculation:
    """How much to draft for a request.

    A tree of ``nodes`` with the root, ``depth`` levels and ``top_k`` children each; and beside it, where the
    text repeats itself, a chain of up to ``lookup`` tokens by prompt lookup.
    """

    nodes: int = 8
    depth: int = 4
    top_k: int = 4
    lookup: int = 0

    @property
    def has_tree(self) -> bool:
        return self.nodes > 1 and self.depth >= 1

    @property
    def is_off(self) -> bool:
        return not self.has_tree and self.lookup < 1

    @property
    def may_resume(self) -> bool:
        """Whether a head has to follow the sequence: it speculates, if not in a step that leaves it no nodes
        but its root."""
        return self.depth >= 1

    @property
    def most_accepted(self) -> int:
        """Draft tokens that one step can accept."""
        return max(min(self.depth, self.nodes - 1) if self.has_tree else 0, self.lookup)

    def limited(self, num_tokens: int) -> Speculation:
        """The same, with no path longer than so many draft tokens."""
        if num_tokens >= max(self.depth, self.lookup):
            return self
        if num_tokens < 1:
            return SPECULATION_OFF
        return Speculation(self.nodes, min(self.depth, num_tokens), self.top_k, min(self.lookup, num_tokens))

    def within(self, num_nodes: int) -> Speculation:
        """The same, with no more nodes than so many, the root and the lookup's chain included. With the root
        alone it is off, but may resume."""
        if num_nodes >= self.nodes + self.lookup:
            return self
        nodes = min(self.nodes, num_nodes)
        depth = min(self.depth, nodes - 1) if nodes > 1 else self.depth
        return Speculation(nodes, depth, self.top_k, min(self.lookup, num_nodes - nodes))


SPECULATION_OFF = Speculation(nodes=1, depth=0, top_k=1)


@dataclass(frozen=True, slots=True)
class Decision:
    """What to draft for one sequence in one step, why, and the milliseconds per token that this is expected
    to save against plain decoding of the whole batch (0 where nobody reckons)."""

    speculation: Speculation
    reason: str
    saved_ms: float = 0.0


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer has to match from its first token to its last: see ``engine.text.grammar``.

    ``text`` is a JSON schema, nothing (any JSON object), a regular expression, a JSON list of strings, or a
    grammar in Lark's or GBNF's notation.
    """

    kind: Literal["json_schema", "json_object", "regex", "choice", "lark"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """What decides the tokens of one request. Temperature 0 is greedy; ``top_k`` 0 and ``top_p`` 1 are
    off.

    The penalties, ``logit_bias`` (token, what is added), ``bad_words`` (token sequences that never come) and
    ``min_tokens`` (before which nothing ends the answer) are edits of the logits: see ``engine.edits``.
    ``grammar``: what the answer must match; where it can only end, it does, whatever ``ignore_eos`` and
    ``min_tokens`` say.
    ``logprobs``: how many alternatives to report beside every emitted token; None reports nothing.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    include_stop_str_in_output: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    bad_words: tuple[tuple[int, ...], ...] = ()
    min_tokens: int = 0
    logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked; never changes. ``speculation`` None means the engine's default; of two requests
    the one with the lower ``priority`` runs first. Requests reuse the rows of others with the same
    ``cache_salt`` only."""

    id: int
    prompt: tuple[int, ...]
    sampling: SamplingParams
    speculation: Speculation | None = None
    priority: int = 0
    cache_salt: str = ""


@dataclass(eq=False, slots=True)
class Sequence:
    """Host truth about one request; written by the Scheduler only.

    ``tokens`` are committed: all but the last have their KV row. ``forced`` are known tokens that still have
    to pass through the model: the rest of the prompt, or after a preemption everything that was generated
    before. ``arrival`` numbers the requests as they come. ``num_cached`` tokens of the prompt had their rows
    in the prefix cache when it first started; until then it is None.
    """

    request: Request
    tokens: list[int]
    forced: list[int]
    pages: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    num_cached: int | None = None
    arrival: int = 0

    @property
    def order(self) -> tuple[int, int]:
        """Who is served first: by priority, then by arrival."""
        return self.request.priority, self.arrival

    @property
    def kv_len(self) -> int:
        return len(self.tokens) - 1

    @property
    def num_generated(self) -> int:
        return len(self.tokens) + len(self.forced) - len(self.request.prompt)


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """The sampling parameters of a batch, one entry per sequence."""

    temperature: Tensor  # [B] float32; 0 is greedy
    top_k: Tensor  # [B] int64; 0 is off
    top_p: Tensor  # [B] float32; 1 is off
    min_p: Tensor  # [B] float32; 0 is off
    seed: Tensor  # [B] int64
    all_greedy: bool  # host facts that spare work; they say which operations run, so graphs are kept by them
    any_filter: bool
    any_top_p: bool
    most_top_k: int  # no less than any top_k, a power of two; 0 where all are off

    @property
    def facts(self) -> tuple[bool, bool, bool, int]:
        """Those host facts: two batches of the same take the same operations."""
        return self.all_greedy, self.any_filter, self.any_top_p, self.most_top_k

    def select(self, rows: Tensor) -> SamplingTensors:
        """The parameters of some of the batch's sequences (rows: [b] int64)."""
        return replace(
            self,
            temperature=self.temperature[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            seed=self.seed[rows],
        )


@dataclass(frozen=True, slots=True)
class DraftScores:
    """What the draft believed of its nodes. The root's entries are 1, 1 and 0."""

    raw: Tensor  # [B, N] the head's own conditional score of the node, in (0, 1]
    value: Tensor  # [B, N] product of the calibrated conditional acceptances along the path
    rank: Tensor  # [B, N] rank among its siblings, 0 is best


@dataclass(frozen=True, slots=True)
class DraftTree:
    """Node 0 is the root: the last committed token, not yet in the KV cache.

    Padding nodes (ragged trees in one batch) have parent -1 and an index past 0: they descend from nothing,
    so they can never be accepted. They come last: a sequence has reserved rows for its own nodes alone.
    Everything else about a tree is derived from ``parents``.
    """

    tokens: Tensor  # [B, N] int64
    parents: Tensor  # [B, N] int64; parents[:, 0] == -1, parents[:, i] < i, siblings distinct
    scores: DraftScores | None = None  # of drafted trees only

    def real(self) -> Tensor:
        """[B, N] bool: which nodes are not padding."""
        real = self.parents >= 0
        real[:, 0] = True
        return real

    def resized(self, num_nodes: int) -> DraftTree:
        """The same trees with so many nodes each, more or less padding among them."""
        missing = (0, num_nodes - self.tokens.shape[1])
        if missing == (0, 0):
            return self
        scores = self.scores
        if scores is not None:
            scores = DraftScores(*(pad(of, missing) for of in (scores.raw, scores.value, scores.rank)))
        return DraftTree(pad(self.tokens, missing), pad(self.parents, missing, value=-1), scores)

    def depths(self) -> Tensor:
        """[B, N] int64: edges from the root; 0 for padding.

        Pointer jumping: after round r every node knows its distance to the ancestor 2^r levels up, so a tree
        of N nodes takes log2(N) rounds, whatever its shape. On a CPU a walk through a list is faster.
        """
        if self.parents.device.type == "cpu":
            return torch.tensor([depths_of(parents) for parents in self.parents.tolist()])
        depths, up = (self.parents >= 0).long(), self.parents.clamp(min=0)
        for _ in range((self.parents.shape[1] - 1).bit_length()):
            depths = depths + depths.gather(1, up)
            up = up.gather(1, up)
        return depths

    def ancestors(self) -> Tensor:
        """[B, N, N] bool: entry (i, j) says that j is i or one of i's ancestors.

        The matrix of self and parent reaches one edge, and each squaring doubles that; a chain has N - 1
        edges. Meant for trees of up to a few dozen nodes.
        """
        num_seqs, num_nodes = self.parents.shape
        reach = torch.eye(num_nodes, device=self.parents.device).repeat(num_seqs, 1, 1)
        # Padding has no parent: its entry falls on itself, as the root's does, and says nothing new.
        node = torch.arange(num_nodes, device=self.parents.device)
        own_parent = torch.where(self.parents >= 0, self.parents, node)
        reach.scatter_(2, own_parent[..., None], 1.0)
        for _ in range(max(num_nodes - 2, 0).bit_length()):
            reach = torch.bmm(reach, reach).clamp_(max=1.0)
        return reach > 0


def depths_of(parents: list[int]) -> list[int]:
    """``DraftTree.depths`` of one tree on the host: edges from the root, 0 for padding."""
    depths = [0]
    for parent in parents[1:]:
        depths.append(depths[parent] + 1 if parent >= 0 else 0)
    return depths


@dataclass(frozen=True, slots=True)
class PromptChunk:
    """A piece of known text to run through the model: a chain that is accepted in advance."""

    tokens: Tensor  # [B, N] int64; the root, then forced tokens, 0 padded
    num_nodes: Tensor  # [B] int64; real nodes of each row
    next_token: Tensor  # [B] int64; the known token after the chunk, -1 where the model must choose it
    lengths: tuple[int, ...]  # num_nodes on the host


@dataclass(frozen=True, slots=True)
class Batch:
    """The decodes of one step, or its chunks of prompts, and all that the step needs of them; built whole by
    the scheduler.

    Decodes that may be captured (``engine.graphs``) are *fixed*: their tensors are there for good, and are
    filled anew for every step. There B is a bucket: rows behind those of the sequences are padding, whose
    pages are all the dummy page.
    """

    seqs: tuple[Sequence, ...]
    kv_lens: Tensor  # [B] int64
    page_table: Tensor  # [B, P] int64, padded with page 0, the dummy page
    page_size: int
    sampling: SamplingTensors
    speculation: tuple[Speculation, ...]  # what to draft for each sequence
    prompt: PromptChunk | None = None  # set for chunks of prompts
    decisions: tuple[Decision, ...] = ()  # of decodes: why they draft what they draft
    roots: Tensor | None = None  # [B] int64: the last committed tokens, of a fixed batch

    @property
    def is_fixed(self) -> bool:
        return self.roots is not None

    @property
    def is_prefill(self) -> bool:
        return self.prompt is not None

    def chooses(self, row: int) -> bool:
        """Whether a sequence gets a token of the target's choice, not one that is known."""
        return self.prompt is None or self.prompt.lengths[row] > len(self.seqs[row].forced)

    def num_known(self, row: int) -> int:
        """Tokens of a sequence's text up to the first node that is scored: the root, or the last node of a
        chunk of a prompt."""
        return len(self.seqs[row].tokens) + (0 if self.prompt is None else self.prompt.lengths[row] - 1)

    def known_tokens(self, row: int, first: int = 0) -> list[int]:
        """The tokens that ``num_known`` counts, but for the ``first`` ones."""
        seq = self.seqs[row]
        if self.prompt is None:
            return seq.tokens[first:]
        return (seq.tokens + seq.forced[: self.prompt.lengths[row] - 1])[first:]

    def slots(self, rows: Tensor) -> Tensor:
        """Slots of KV rows ([B, n] int64 row numbers -> [B, n] int64). Rows past the table lie on the dummy
        page."""
        return slots_of(rows, self.page_table, self.page_size)


def slots_of(rows: Tensor, page_table: Tensor, page_size: int) -> Tensor:
    """Slots of KV rows: rows [B, n] int64, page_table [B, P] -> [B, n]. Rows past the table lie on the dummy
    page."""
    page = torch.div(rows, page_size, rounding_mode="floor")
    width = page_table.shape[1]
    pages = page_table.gather(1, page.clamp(max=width - 1))
    return torch.where(page < width, pages * page_size, 0) + rows % page_size


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the T real nodes of trees of different sizes lie when they are rows behind one another."""

    nodes: Tensor  # [T] int64: which of the B * N nodes the rows are
    places: Tensor  # [B, N] int64: the row of every node; of padding, that of the node before


@dataclass(frozen=True, slots=True)
class Scores:
    """What one forward of the target says of a batch."""

    logits: Tensor  # [B, R, V] float32; R = N, but only the last row of a prompt chunk
    positions: Tensor  # [B, R] int64: positions of the scored nodes
    features: Tensor  # [B, N, F]: what the head wants; F = 0 without a head
    packing: Packing | None = None  # of the logits, which are [T, V] then: they are too wide to be padded

    def unpacked(self) -> Scores:
        """The same, with logits of all nodes; padding repeats its sequence's last one."""
        if self.packing is None:
            return self
        return replace(self, logits=self.logits[self.packing.places], packing=None)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a step emits: the accepted path and the target's own next token."""

    path: Tensor  # [B, N] int64 accepted nodes, root first, -1 padded
    length: Tensor  # [B] int64 accepted nodes, root included
    bonus: Tensor  # [B] int64; the next root, or NO_CHOICE


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """What the target thought of an emitted token, before any parameter of the request had its say, and of
    those it found likeliest there: (token, its log-probability), best first."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step did for one request: the host's view, sent to the client."""

    request_id: int
    token_ids: tuple[int, ...]  # new tokens, possibly none (prefill goes on, or aborted)
    finish_reason: FinishReason | None
    logprobs: tuple[TokenLogprob, ...] = ()  # of each of the new tokens, if the request asks for them
    num_draft_tokens: int = 0  # drafted nodes without the root; 0 for prompts and in plain steps
    num_accepted: int = 0  # of them accepted by the target
    draft_depth: int = 0  # levels of the drafted tree
    is_decode: bool = True  # False for a chunk of a prompt
    num_cached: int = 0  # tokens of the prompt that the prefix cache spared the request
    decision: Decision | None = None  # of a decode: what was to be drafted
    num_forced: int = 0  # of the new tokens, the last so many have yet to pass through the model
    error: str | None = None  # why the request ended, if the finish reason is "error"


@dataclass(frozen=True, slots=True)
class StepCost:
    """What a step of decodes alone took, drafting included: rows of the target in all, behind ``context``
    tokens on average."""

    num_rows: int
    context: float
    seconds: float
