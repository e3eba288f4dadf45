"""The data phase: the recorder, the cache on disk, prompts, and the collector with a scripted engine."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence as Items
from pathlib import Path

import pytest
import torch

from draft.train.batches import plan_epoch
from draft.train.collect import Collector, DataSettings
from draft.train.prompts import OPENERS, looks_like_text, read_prompts
from draft.train.recorder import FeatureRecorder
from draft.train.shards import Dataset, Document, Manifest, ShardWriter, split
from engine.core import (
    SPECULATION_OFF,
    Batch,
    Delta,
    DraftTree,
    FinishReason,
    Request,
    SamplingParams,
    Sequence,
    Verdict,
)
from engine.errors import CheckpointError, ConfigError
from engine.sampler import sampling_tensors


def sequence(number: int, tokens: Items[int], prompt_len: int) -> Sequence:
    return Sequence(Request(number, tuple(range(prompt_len)), SamplingParams()), list(tokens), [])


def batch_of(seqs: list[Sequence]) -> Batch:
    return Batch(
        tuple(seqs),
        torch.tensor([seq.kv_len for seq in seqs]),
        torch.zeros(len(seqs), 1, dtype=torch.int64),
        16,
        sampling_tensors([seq.request.sampling for seq in seqs], "cpu"),
        (SPECULATION_OFF,) * len(seqs),
    )


def observe(recorder: FeatureRecorder, seqs: list[Sequence], paths: list[list[int]], num_nodes: int) -> None:
    """A step whose node j of a sequence carries the feature 100 * id + kv_len + its place in the path (or
    -1).
    """
    path = torch.full((len(seqs), num_nodes), -1)
    features = torch.full((len(seqs), num_nodes, 2), -1.0)
    for row, (seq, nodes) in enumerate(zip(seqs, paths, strict=True)):
        path[row, : len(nodes)] = torch.tensor(nodes)
        for place, node in enumerate(nodes):
            features[row, node] = 100 * seq.request.id + seq.kv_len + place
    tree = DraftTree(
        torch.zeros(len(seqs), num_nodes, dtype=torch.int64), torch.full((len(seqs), num_nodes), -1)
    )
    verdict = Verdict(
        path, torch.tensor([len(nodes) for nodes in paths]), torch.zeros(len(seqs), dtype=torch.int64)
    )
    recorder.observe(batch_of(seqs), tree, verdict, features)
    for seq, nodes in zip(seqs, paths, strict=True):
        seq.tokens.extend([7] * len(nodes))


def test_recorder_keeps_accepted_rows_of_ragged_batches() -> None:
    recorder = FeatureRecorder()
    first, second = sequence(1, [5], 4), sequence(2, [6], 2)
    observe(recorder, [first, second], [[0, 1, 2, 3], [0, 1]], 4)  # prompts of different lengths in one chunk
    observe(recorder, [second], [[0]], 1)
    observe(recorder, [first, second], [[0, 2], [0]], 3)  # a tree in which node 1 was not accepted
    for seq in (first, second):
        seq.finish_reason = "stop"
        recorder.forget(seq)
    recording = recorder.take(1)
    assert recording.features.dtype == torch.bfloat16
    assert recording.prompt_len == 4
    assert len(recording.tokens) == 7
    assert recording.features[:, 0].tolist() == [100 + i for i in range(6)]
    assert recorder.take(2).features[:, 0].tolist() == [200 + i for i in range(4)]
    with pytest.raises(KeyError):
        recorder.take(1)


def test_recorder_drops_what_was_preempted_or_aborted_and_rows_past_the_end() -> None:
    recorder = FeatureRecorder()
    seq = sequence(1, [5], 2)
    observe(recorder, [seq], [[0, 1]], 2)
    recorder.forget(seq)  # preempted: it starts over
    seq.tokens = [5]
    observe(recorder, [seq], [[0, 1, 2]], 3)
    del seq.tokens[-1]  # its end lay inside the accepted path
    seq.finish_reason = "length"
    recorder.forget(seq)
    assert recorder.take(1).features[:, 0].tolist() == [100, 101]
    aborted = sequence(3, [5], 2)
    observe(recorder, [aborted], [[0, 1]], 2)
    aborted.finish_reason = "abort"
    recorder.forget(aborted)
    with pytest.raises(KeyError):
        recorder.take(3)


def test_recorder_proposes_roots_only() -> None:
    recorder = FeatureRecorder()
    tree = recorder.propose(batch_of([sequence(1, [5, 9], 1), sequence(2, [4], 1)]))
    assert tree.tokens.tolist() == [[9], [4]]
    assert tree.parents.tolist() == [[-1], [-1]]
    assert recorder.scratch_rows(SPECULATION_OFF) == 0


def document(number: int, length: int) -> Document:
    tokens = torch.arange(length, dtype=torch.int32) + number
    features = torch.arange((length - 1) * 6).view(length - 1, 6).bfloat16() + number
    return Document(tokens, features, torch.arange(length) >= 2, number % 2 == 0, f"prompt {number}")


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    writer = ShardWriter(Manifest.open(tmp_path, {"seed": 1}), shard_tokens=16)
    documents = [document(number, 4 + number) for number in range(5)]
    flushes = 0
    for number, doc in enumerate(documents):
        if writer.add(doc):
            writer.flush(number + 1, 2.0)
            flushes += 1
    assert writer.num_answer_tokens == sum(2 + number for number in range(5))
    writer.flush(5, 1.0)
    dataset = Dataset(tmp_path)
    assert flushes == 1
    assert len(dataset.manifests[0].shards) == 2
    assert len(dataset) == 5
    assert dataset.lengths == [4, 5, 6, 7, 8]
    assert dataset.seconds == 3.0
    for index, doc in enumerate(documents):
        found = dataset.load(index)
        assert torch.equal(found.tokens, doc.tokens)
        assert torch.equal(found.features, doc.features)
        assert torch.equal(found.answer, doc.answer)
        assert found.greedy == doc.greedy
    assert dataset.answer_counts(16, [0, 2]).tolist() == [0, 0, 1, 1, 1, 1, 1, 1] + [0] * 8
    assert dataset.num_answer_tokens([0, 2]) == 6
    assert dataset.manifests[0].prompt_texts() == [f"prompt {number}" for number in range(5)]


def test_manifests_of_other_settings_and_broken_shards_are_refused(tmp_path: Path) -> None:
    manifest = Manifest.open(tmp_path, {"seed": 1, "layers": [1, 2]})
    assert Manifest.open(tmp_path, {"seed": 1, "layers": (1, 2)}).shards == []
    with pytest.raises(ConfigError, match="made with seed = 1, this run has 2"):
        Manifest.open(tmp_path, {"seed": 2, "layers": [1, 2]})
    with pytest.raises(ConfigError, match="no finished shard"):
        Dataset(tmp_path)
    writer = ShardWriter(manifest)
    writer.add(document(0, 5))
    writer.flush(1, 1.0)
    shard = tmp_path / manifest.shards[0].file
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="not a training shard"):
        Dataset(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a training data manifest"):
        Dataset(tmp_path)


def test_epochs_hold_every_document_once_within_the_budget() -> None:
    lengths = [3 + (7 * i) % 40 for i in range(200)]
    documents = list(range(0, 200, 2))
    plan = plan_epoch(lengths, documents, 100, seed=3, epoch=1)
    assert sorted(index for batch in plan for index in batch) == documents
    assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in plan)
    assert plan == plan_epoch(lengths, documents, 100, seed=3, epoch=1)
    assert plan != plan_epoch(lengths, documents, 100, seed=3, epoch=2)
    assert plan_epoch([500], [0], 100, 0, 0) == [[0]]
    assert split(7, 3) == ([1, 2, 4, 5], [0, 3, 6])


def test_prompt_files(tmp_path: Path) -> None:
    path = tmp_path / "prompts"
    path.write_text('plain one\n\n{"prompt": "of an object"}\n{"text": "of text"}\n"a string"\n{not json\n')
    assert read_prompts(path) == ["plain one", "of an object", "of text", "a string", "{not json"]
    path.write_text('{"question": "?"}\n')
    with pytest.raises(ConfigError, match='prompts:1: expected a JSON string, or an object with "prompt"'):
        read_prompts(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no prompt found"):
        read_prompts(path)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_prompts(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "num_tokens", "good"),
    [
        ("What is the capital of France?", 7, True),
        ("Hi", 2, False),
        ("word " * 50, 50, False),
        ("1234 5678 ++++ ==== ????", 20, False),
        ("What is <|im_start|> for?", 8, False),
        ("What is \ufffd here?", 8, False),
        ("What is the capital of France?", 201, False),
        ("x\x00y what is that then", 8, False),
    ],
)
def test_what_looks_like_text(text: str, num_tokens: int, good: bool) -> None:
    assert looks_like_text(text, num_tokens) == good


class ScriptedEngine:
    """Finishes one request a step: every user turn is 'question N', every answer three tokens."""

    def __init__(self, recorder: FeatureRecorder, chat: WordChat) -> None:
        self.recorder, self.chat = recorder, chat
        self.queue: deque[Request] = deque()
        self.requests: list[Request] = []

    def add(self, request: Request) -> None:
        self.queue.append(request)
        self.requests.append(request)

    @property
    def has_work(self) -> bool:
        return bool(self.queue)

    def step(self) -> list[Delta]:
        request = self.queue.popleft()
        is_question = request.sampling.max_tokens > 100
        words = ["is", "it", f"{request.id // 3}?"] if is_question else ["it", "is", "so"]
        seq = Sequence(request, [*request.prompt, *self.chat.encode(words)], [])
        count = len(seq.tokens) - 1
        features = torch.zeros(1, count, 2)
        replay = Sequence(request, [request.prompt[0]], [])
        verdict = Verdict(torch.arange(count)[None], torch.tensor([count]), torch.zeros(1, dtype=torch.int64))
        self.recorder.observe(
            batch_of([replay]), DraftTree(torch.zeros(1, count), torch.zeros(1, count)), verdict, features
        )
        reason: FinishReason = "length" if is_question and request.id % 5 == 0 else "stop"
        seq.finish_reason = reason
        self.recorder.forget(seq)
        return [Delta(request.id, (), reason)]


class WordChat:
    """Words are tokens; 0 opens the user's turn, 1 the assistant's."""

    def __init__(self) -> None:
        self.words: list[str] = ["<user>", "<assistant>"]

    def encode(self, words: Items[str]) -> list[int]:
        self.words += [word for word in dict.fromkeys(words) if word not in self.words]
        return [self.words.index(word) for word in words]

    def user_turn(self, opener: str) -> list[int]:
        return [0, *self.encode(opener.split())]

    def question(self, user_text: str) -> list[int]:
        return [0, *self.encode(user_text.split()), 1]

    def text(self, token_ids: Items[int]) -> str:
        return " ".join(["", *(self.words[index] for index in token_ids)])


def collect(directory: Path, tokens: int, prompts: Items[str] = ()) -> ScriptedEngine:
    recorder, chat = FeatureRecorder(), WordChat()
    engine = ScriptedEngine(recorder, chat)
    settings = DataSettings(tokens=tokens, max_answer_tokens=50, batch_size=4, shard_tokens=30)
    Collector(engine, recorder, chat, Manifest.open(directory, {}), settings, prompts).run()
    return engine


def test_collector_answers_given_prompts_then_its_own_and_resumes(tmp_path: Path) -> None:
    engine = collect(tmp_path, 30, ["first given prompt", "second given prompt", "first given prompt"])
    dataset = Dataset(tmp_path)
    texts = dataset.manifests[0].prompt_texts()
    assert texts[:2] == ["first given prompt", "second given prompt"]
    assert len(texts) == len(set(texts)) == len(dataset) == 10
    assert dataset.greedy == [True, False] * 5
    assert any(text.startswith(OPENERS) for text in texts)
    for index in range(len(dataset)):
        doc = dataset.load(index)
        assert doc.answer.sum() == 3
        assert doc.answer[-3:].all()
        assert doc.features.shape[0] == doc.tokens.shape[0] - 1
    sampled = [request.sampling for request in engine.requests if request.sampling.max_tokens == 50]
    assert {params.temperature for params in sampled} == {0.0, 0.8}
    again = collect(tmp_path, 45)
    used = {request.id for request in engine.requests[:-4]}
    assert len(Dataset(tmp_path)) == 15
    assert not used & {request.id for request in again.requests}
    lines = (tmp_path / "prompts.jsonl").read_text().splitlines()
    assert len({json.loads(line)["prompt"] for line in lines}) == len(lines) == 15


def test_lines_of_an_unfinished_shard_are_cut_off(tmp_path: Path) -> None:
    collect(tmp_path, 12)
    with (tmp_path / "prompts.jsonl").open("a") as lines:
        lines.write('{"prompt": "of a shard that was never nam')
    collect(tmp_path, 24)
    assert len(Dataset(tmp_path).manifests[0].prompt_texts()) == len(Dataset(tmp_path))
