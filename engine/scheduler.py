"""Who runs next, and what became of it: the one writer of a Sequence.

A sequence waits, runs and ends. While it has ``forced`` tokens (its prompt, or after a preemption all it had)
it takes part in prefill steps, afterwards in decode steps. When both kinds of work exist they take turns, so
that neither a long prompt nor a busy decoder starves the other. If pages run out, the youngest sequence gives
its own back and starts over from its tokens (preemption by recompute), behind what the prefix cache still has
of them by then.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch

from engine.config import EngineConfig
from engine.core import (
    SPECULATION_OFF,
    Batch,
    Delta,
    DraftTree,
    FinishReason,
    PromptChunk,
    Request,
    Sequence,
    Speculation,
    Verdict,
)
from engine.errors import ContextLengthError, RequestError
from engine.pages import PagePool
from engine.prefix import PrefixCache
from engine.sampler import sampling_tensors


class Scheduler:
    """Owns every Sequence and every page.

    prefixes finds and keeps rows in ``pages``; eos_token_ids end a sequence unless it ignores them;
    scratch_rows tells how many KV rows past ``kv_len`` a decode step with a given speculation may write;
    forget is called when a sequence ends or starts over.
    """

    def __init__(
        self,
        config: EngineConfig,
        pages: PagePool,
        prefixes: PrefixCache,
        eos_token_ids: tuple[int, ...],
        scratch_rows: Callable[[Speculation], int],
        forget: Callable[[Sequence], None],
        vocab_size: int,
    ) -> None:
        self.config, self.pages, self.prefixes = config, pages, prefixes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        self._eos, self._vocab_size = frozenset(eos_token_ids), vocab_size
        self._scratch_rows, self._forget = scratch_rows, forget
        self._prefilled_last = False
        self._aborted: list[Delta] = []

    # --- requests

    def add(self, request: Request) -> None:
        """Queue a request. Raises ContextLengthError or RequestError for one that could never run."""
        assert all(request.id != seq.request.id for seq in (*self.waiting, *self.running)), "ids are unique"
        check_request(request, self._vocab_size)
        prompt_len, limit = len(request.prompt), self.config.max_model_len
        if prompt_len >= limit:
            raise ContextLengthError(prompt_len, limit)
        rows = min(prompt_len + request.sampling.max_tokens, limit)
        if self.pages.pages_for(rows) > self.pages.num_usable:
            raise RequestError(
                f"the request needs up to {rows} KV rows, but the cache holds "
                f"{self.pages.num_usable * self.pages.page_size}; give a smaller "
                "max_tokens or start with more KV cache memory",
                "max_tokens",
            )
        self.waiting.append(Sequence(request, [request.prompt[0]], list(request.prompt[1:])))

    def abort(self, request_id: int) -> None:
        """End a request in any state. Unknown or finished ids are ignored: the end may have crossed the
        abort."""
        for seq in (*self.waiting, *self.running):
            if seq.request.id == request_id:
                self._end(seq, "abort")
                self._aborted.append(Delta(request_id, (), "abort", num_cached=seq.num_cached or 0))
                return

    def take_aborted(self) -> list[Delta]:
        """Final deltas of requests aborted since the last call."""
        aborted, self._aborted = self._aborted, []
        return aborted

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running or self._aborted)

    # --- building a batch

    def next_batch(self) -> Batch | None:
        """The sequences of the next step with pages reserved for all their nodes; None when there is nothing
        to do."""
        self._admit()
        prefills = [seq for seq in self.running if seq.forced]
        decodes = [seq for seq in self.running if not seq.forced]
        if prefills and (not decodes or not self._prefilled_last):
            self._prefilled_last = True
            batch = self._prefill_batch(prefills)
            if batch is not None:
                return batch
        self._prefilled_last = False
        return self._decode_batch(decodes) if decodes else None

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.config.max_num_seqs:
            if not self._start(self.waiting[0]):
                return
            self.running.append(self.waiting.popleft())

    def _start(self, seq: Sequence) -> bool:
        """Let a waiting sequence begin behind the rows that the prefix cache has of it. False, and nothing
        done, if pages for its first step are missing."""
        speculation = self._step_speculation(seq)
        pages = self.prefixes.begin(seq, speculation, self.config.max_num_batched_tokens)
        if pages is None:
            return False
        known, num_tokens = seq.tokens + seq.forced, max(len(pages) * self.pages.page_size, 1)
        seq.pages, seq.tokens, seq.forced = pages, known[:num_tokens], known[num_tokens:]
        self.prefixes.resume(seq, speculation)
        if seq.num_cached is None:
            seq.num_cached = seq.kv_len
        return True

    def _prefill_batch(self, candidates: list[Sequence]) -> Batch | None:
        """Chunks of known text, padded to the longest; the padded size stays within the token budget."""
        chosen: list[tuple[Sequence, int]] = []
        longest = 0
        for seq in candidates:
            if seq not in self.running:
                continue  # preempted for an older one a moment ago
            num_nodes = len(seq.forced) + 1
            if not chosen:
                num_nodes = min(num_nodes, self.config.max_num_batched_tokens)
            elif (len(chosen) + 1) * max(longest, num_nodes) > self.config.max_num_batched_tokens:
                break
            if not self._reserve(seq, seq.kv_len + num_nodes):
                break
            chosen.append((seq, num_nodes))
            longest = max(longest, num_nodes)
        if not chosen:
            return None
        tokens = torch.zeros(len(chosen), longest, dtype=torch.int64)
        next_token = torch.full((len(chosen),), -1, dtype=torch.int64)
        for row, (seq, num_nodes) in enumerate(chosen):
            tokens[row, :num_nodes] = torch.tensor(seq.tokens[-1:] + seq.forced[: num_nodes - 1])
            if num_nodes <= len(seq.forced):
                next_token[row] = seq.forced[num_nodes - 1]
        device = self.config.device
        counts = torch.tensor([num_nodes for _, num_nodes in chosen])
        chunk = PromptChunk(tokens.to(device), counts.to(device), next_token.to(device))
        seqs = [seq for seq, _ in chosen]
        return self._batch(seqs, [self._step_speculation(seq) for seq in seqs], chunk)

    def _decode_batch(self, candidates: list[Sequence]) -> Batch | None:
        """Every sequence for which there is room; where there is none for a tree, the root alone is
        decoded."""
        chosen: list[Sequence] = []
        wanted: list[Speculation] = []
        for seq in candidates:
            for speculation in (self._step_speculation(seq), SPECULATION_OFF):
                num_rows = seq.kv_len + 1 + self._scratch_rows(speculation)
                if seq in self.running and self._reserve(seq, num_rows):
                    chosen.append(seq)
                    wanted.append(speculation)
                    break
        return self._batch(chosen, wanted, None) if chosen else None

    def _reserve(self, seq: Sequence, num_rows: int) -> bool:
        """Pages for num_rows rows. Younger sequences make room if they must; the oldest therefore always gets
        on."""
        while not self.pages.extend(seq.pages, num_rows):
            younger = [other for other in self.running[self.running.index(seq) + 1 :] if other.pages]
            if not younger:
                return False
            self._preempt(younger[-1])
        return True

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._give_back(seq)
        seq.forced = seq.tokens[1:] + seq.forced
        seq.tokens = seq.tokens[:1]
        self.waiting.appendleft(seq)

    def _speculation(self, request: Request) -> Speculation:
        return self.config.speculation if request.speculation is None else request.speculation

    def _step_speculation(self, seq: Sequence) -> Speculation:
        """What to draft now: never more tokens than the request may still emit, the bonus not counted."""
        return self._speculation(seq.request).limited(self._remaining(seq) - 1)

    def _remaining(self, seq: Sequence) -> int:
        return min(
            seq.request.sampling.max_tokens - seq.num_generated,
            self.config.max_model_len - len(seq.tokens) - len(seq.forced),
        )

    def _batch(
        self, seqs: list[Sequence], speculation: list[Speculation], chunk: PromptChunk | None
    ) -> Batch:
        device = self.config.device
        width = max(len(seq.pages) for seq in seqs)
        table = torch.tensor([seq.pages + [0] * (width - len(seq.pages)) for seq in seqs], dtype=torch.int64)
        return Batch(
            seqs=tuple(seqs),
            kv_lens=torch.tensor([seq.kv_len for seq in seqs], dtype=torch.int64).to(device),
            page_table=table.to(device),
            page_size=self.pages.page_size,
            sampling=sampling_tensors([seq.request.sampling for seq in seqs], device),
            speculation=tuple(speculation),
            prompt=chunk,
        )

    # --- committing

    def commit(self, batch: Batch, tree: DraftTree, verdict: Verdict) -> list[Delta]:
        """Write the accepted tokens, end what is finished, return surplus pages. The step's one copy to the
        host."""
        paths, bonuses, lengths = verdict.path.tolist(), verdict.bonus.tolist(), verdict.length.tolist()
        tree_tokens = tree.tokens.tolist()
        counts = tree.real().sum(1).tolist()
        depths = tree.depths().amax(1).tolist() if batch.prompt is None else [0] * len(counts)
        deltas = []
        for row, seq in enumerate(batch.seqs):
            new_tokens = [*(tree_tokens[row][node] for node in paths[row][1 : lengths[row]]), bonuses[row]]
            num_known = min(len(new_tokens), len(seq.forced))
            seq.tokens.extend(new_tokens[:num_known])
            del seq.forced[:num_known]
            emitted = self._emit(seq, new_tokens[num_known:])
            self.prefixes.publish(seq)
            if seq.finish_reason is None:
                self.pages.shrink(seq.pages, seq.kv_len + 1)
            else:
                self._end(seq, seq.finish_reason)
            drafted = batch.prompt is None
            deltas.append(
                Delta(
                    seq.request.id,
                    emitted,
                    seq.finish_reason,
                    is_decode=drafted,
                    num_draft_tokens=counts[row] - 1 if drafted else 0,
                    num_accepted=min(lengths[row] - 1, len(emitted)) if drafted else 0,
                    draft_depth=depths[row],
                    num_cached=seq.num_cached or 0,
                )
            )
        return deltas

    def _emit(self, seq: Sequence, new_tokens: list[int]) -> tuple[int, ...]:
        """Append chosen tokens up to the first that ends the sequence; sets its finish reason."""
        sampling = seq.request.sampling
        for count, token in enumerate(new_tokens, start=1):
            seq.tokens.append(token)
            if token in sampling.stop_token_ids or (token in self._eos and not sampling.ignore_eos):
                seq.finish_reason = "stop"
            elif self._remaining(seq) < 1:
                seq.finish_reason = "length"
            else:
                continue
            return tuple(new_tokens[:count])
        return tuple(new_tokens)

    def _end(self, seq: Sequence, reason: FinishReason) -> None:
        seq.finish_reason = reason
        if seq in self.running:
            self.running.remove(seq)
        else:
            self.waiting.remove(seq)
        self._give_back(seq)

    def _give_back(self, seq: Sequence) -> None:
        """All that is kept for a sequence, but for what the prefix cache keeps for others."""
        self.prefixes.leave(seq)
        self.pages.shrink(seq.pages, 0)
        self._forget(seq)


def check_request(request: Request, vocab_size: int) -> None:
    """Refuse what no step could run, whoever asks (RequestError names the field, found and expected)."""

    def refuse(param: str, found: object, expected: str) -> None:
        raise RequestError(f"{param} is {found}, expected {expected}", param)

    if not request.prompt:
        raise RequestError("the prompt is empty; at least one token is needed", "prompt")
    wrong = [token for token in request.prompt if not 0 <= token < vocab_size]
    if wrong:
        refuse("prompt", f"a list with token {wrong[0]}", f"tokens of 0 to {vocab_size - 1}")
    sampling = request.sampling
    if not (sampling.temperature == 0 or 1e-5 <= sampling.temperature <= 100):
        refuse("temperature", sampling.temperature, "0 (greedy) or 1e-5 to 100")
    if not 0 < sampling.top_p <= 1:
        refuse("top_p", sampling.top_p, "more than 0 and at most 1")
    if not 0 <= sampling.min_p <= 1:
        refuse("min_p", sampling.min_p, "0 to 1")
    if not 0 <= sampling.top_k < 2**31:
        refuse("top_k", sampling.top_k, "0 (off) or more")
    if not -(2**63) <= sampling.seed < 2**63:
        refuse("seed", sampling.seed, "an integer of 64 bits")
    if sampling.max_tokens < 1:
        refuse("max_tokens", sampling.max_tokens, "at least 1")
    spec = request.speculation
    if spec is not None and not (
        1 <= spec.nodes <= 64 and 0 <= spec.depth <= 16 and 1 <= spec.top_k <= 16 and 0 <= spec.lookup <= 16
    ):
        refuse("speculation", spec, "nodes of 1 to 64, depth and lookup of 0 to 16, top_k of 1 to 16")
