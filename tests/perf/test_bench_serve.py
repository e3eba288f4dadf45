"""``haast bench serve`` from the command line to its last line, against scripted servers and our own."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.cli import bench_serve, bench_serve_report
from engine.cli.main import main
from engine.config import EngineConfig
from tests.perf.endpoints import DONE, Reply, Scripted, event, in_background, piece, usage
from tests.server.fakes import FakeEngine, script, server

Bench = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    """A server that answers every request alike."""
    with in_background(Scripted().serving) as found:
        yield found


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command; the exit code and what its last line says."""

    def run(*words: object) -> tuple[int, dict[str, Any]]:
        code = main(["bench", "serve", *map(str, words)])
        said = capsys.readouterr()
        assert said.out, said.err
        found: dict[str, Any] = json.loads(said.out.splitlines()[-1])
        return code, found

    return run


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command that must fail says."""
    try:
        code = main(["bench", "serve", *map(str, words)])
    except SystemExit as error:  # the parser's own
        code = 1 if error.code == 2 else 0
    assert code == 1
    return capsys.readouterr().err


def test_our_server(bench: Bench) -> None:
    engine = FakeEngine(
        script(b"He", b"llo", b" you", finish="length"),
        config=EngineConfig(max_model_len=512, max_num_seqs=2),
    )
    with in_background(lambda: server(engine, max_num_queued_reqs=100)) as api:
        code, result = bench("--base-url", api.url, "--num-prompts", 10, "--max-concurrency", 3)
    assert code == 0
    assert (result["completed"], result["failed"], result["not_sent"]) == (10, 0, 0)
    assert (result["model_id"], result["max_concurrency"], result["request_rate"]) == ("fake", 3, "inf")
    assert result["total_output_tokens"] == 90
    assert result["kinds"].keys() == {"prose", "facts", "code", "lists", "json"}
    assert {figures["acceptance_length"] for figures in result["kinds"].values()} == {3.5}
    assert result["spec_decode_num_drafts"] == 20
    assert result["max_concurrent_requests"] <= 3
    assert result["client"]["command"].startswith("haast bench serve --base-url http://127.0.0.1:")
    assert len(engine.added) == 11  # and the warm-up
    prompts = [bytes(request.prompt).decode() for request in engine.added]
    assert "Warm-up." in prompts[0]
    assert not any("Warm-up." in prompt for prompt in prompts[1:])
    assert len(set(prompts)) == 11


def test_the_request_is_what_the_flags_say(scripted: Scripted, bench: Bench) -> None:
    words = (
        "--backend openai --dataset-name random --random-input-len 6 --random-output-len 5 --num-prompts 2"
    )
    words += " --temperature 0.5 --top-k 3 --num-warmups 2 --header X-Team=a=b --api-key hunter2 --label mine"
    extra = '{"speculation": "off", "top_k": 4}'
    code, result = bench("--base-url", scripted.url, *words.split(), "--extra-body", extra)
    assert code == 0
    assert len(scripted.asked) == 4
    for path, body, headers in scripted.asked:
        assert path == "/v1/completions"
        assert len(body.pop("prompt").removeprefix("Warm-up. ").split()) == 6
        assert body == {
            "model": "scripted",
            "max_tokens": 5,
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "top_k": 4,
            "ignore_eos": True,
            "speculation": "off",
        }
        assert (headers["Authorization"], headers["X-Team"]) == ("Bearer hunter2", "a=b")
    assert (result["label"], result["num_prompts"], result["total_output_tokens"]) == ("mine", 2, 10)
    assert "hunter2" not in json.dumps(result)
    assert "a=b" not in json.dumps(result)


def test_keys_come_from_variables_too(
    scripted: Scripted, bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "theirs")
    bench("--base-url", scripted.url, "--num-prompts", 1)
    monkeypatch.setenv("HAAST_API_KEY", "ours")
    bench("--base-url", scripted.url, "--num-prompts", 1)
    assert [headers["Authorization"] for _, _, headers in scripted.asked] == ["Bearer theirs"] * 2 + [
        "Bearer ours"
    ] * 2


def test_arrivals_percentiles_and_goodput(scripted: Scripted, bench: Bench) -> None:
    words = "--request-rate 500 --burstiness 0.5 --num-prompts 6 --percentile-metrics ttft,e2el"
    words += " --metric-percentiles 50,99.5 --goodput ttft:60000 e2el:60000 --metadata gpu=none"
    code, result = bench("--base-url", scripted.url, *words.split())
    assert code == 0
    assert (result["request_rate"], result["burstiness"], result["gpu"]) == (500, 0.5, "none")
    assert result["goodput_share"] == 1
    assert result["p99.5_ttft_ms"] >= result["p50_ttft_ms"] == result["median_ttft_ms"] > 0
    assert not [key for key in result if "tpot" in key or "itl" in key]
    assert result["mean_delay_ms"] >= 0


def test_the_result_is_saved(scripted: Scripted, bench: Bench, tmp_path: Path) -> None:
    place = tmp_path / "new" / "place"
    words = ("--base-url", scripted.url, "--num-prompts", 3, "--max-concurrency", 1, "--save-result")
    _, result = bench(*words, "--result-dir", place)
    (path,) = place.iterdir()
    assert path.name == f"openai-chat-infqps-concurrency1-scripted-{result['date']}.json"
    assert json.loads(path.read_text()) == result
    _, result = bench(*words, "--result-dir", place, "--result-filename", "a.json", "--save-detailed")
    detailed = json.loads((place / "a.json").read_text())
    assert {key: detailed[key] for key in result} == result
    assert detailed["generated_texts"] == ["Hello"] * 3
    assert [len(gaps) for gaps in detailed["itls"]] == [1] * 3
    assert detailed["output_lens"] == [5] * 3


def test_two_servers_are_asked_the_same(bench: Bench, scripted: Scripted) -> None:
    other = (piece("Hello", "stop"), usage(10), DONE)
    with in_background(Scripted([Reply(other)]).serving) as second:
        code, result = bench(
            *("--base-url", scripted.url, "--compare", second.url, "--num-prompts", 8, "--seed", 3),
            *("--compare-blocks", 4, "--compare-extra-body", '{"speculation": "off"}'),
        )
    assert code == 0
    asked = [[body["messages"] for _, body, _ in one.asked] for one in (scripted, second)]
    assert asked[0] == asked[1]
    assert [body.get("speculation") for _, body, _ in scripted.asked + second.asked] == [None] * 9 + [
        "off"
    ] * 9
    compared = result["compare"]
    assert (compared["base_url"], compared["completed"], compared["num_blocks"]) == (second.url, 8, 4)
    assert (result["total_output_tokens"], compared["total_output_tokens"]) == (40, 80)
    assert compared["texts_equal_share"] == 1
    throughput = compared["ratios"]["output_throughput"]
    assert throughput["first"] == pytest.approx(result["output_throughput"])
    assert throughput["second"] == pytest.approx(compared["output_throughput"])
    assert throughput["low"] <= throughput["ratio"] <= throughput["high"]


def test_one_server_with_and_without(bench: Bench, scripted: Scripted) -> None:
    extra = '{"speculation": "off"}'
    code, result = bench(
        "--base-url", scripted.url, "--num-prompts", 4, "--compare-extra-body", extra, "--max-concurrency", 2
    )
    assert (code, result["compare"]["num_blocks"]) == (0, 2)
    names = [name for name, _ in bench_serve_report.runs(result)]
    assert names == [
        f"1: scripted at {scripted.url}",
        f'2: scripted at {scripted.url} with {{"speculation": "off"}}',
    ]


def test_failures_are_counted_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    broken = Reply((piece("a"), event(error={"message": "it broke"}), DONE))
    replies = [Reply(), Reply(), broken, Reply((b'{"error": {"message": "full"}}',), 503), broken, Reply()]
    with in_background(Scripted(replies).serving) as api:
        assert (
            main(["bench", "serve", "--base-url", api.url, "--num-prompts", "6", "--max-concurrency", "1"])
            == 1
        )
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert (result["completed"], result["failed"], result["not_sent"]) == (3, 3, 0)
    wanted = {"the server failed: it broke": 2, "the server answered 503: full": 1}
    assert result["error_counts"] == wanted
    assert "2 failed: the server failed: it broke" in out
    assert len(api.asked) == 7  # none was sent twice


def test_a_server_that_dies_leaves_what_was_measured(bench: Bench) -> None:
    with in_background(Scripted(dies_after=4).serving) as api:
        code, result = bench("--base-url", api.url, "--num-prompts", 30, "--max-concurrency", 1)
    assert code == 1
    assert (result["completed"], result["failed"], result["not_sent"]) == (3, 2, 25)
    assert result["median_ttft_ms"] > 0
    with in_background(Scripted(dies_after=4).serving) as api:
        words = ("--base-url", api.url, "--num-prompts", 12, "--max-concurrency", 1)
        code, result = bench(*words, "--compare-extra-body", '{"seed": 1}')
    assert code == 1
    counts = [
        [one[key] for key in ("completed", "failed", "not_sent")] for one in (result, result["compare"])
    ]
    assert sum(counts[0] + counts[1]) == 24
    assert counts[0][0] + counts[1][0] == 2


def test_a_server_that_counts_no_tokens(bench: Bench) -> None:
    with in_background(Scripted([Reply((piece("a"), piece("b", "stop"), DONE))]).serving) as api:
        code, result = bench("--base-url", api.url, "--num-prompts", 2)
    assert (code, result["completed"], result["without_usage"]) == (0, 2, 2)
    assert result["mean_tpot_ms"] is result["output_throughput"] is None
    assert result["mean_ttft_ms"] > 0


def test_it_waits_for_a_server_that_starts(bench: Bench) -> None:
    loading = Reply((b'{"error": {"message": "loading"}}',), 503)
    with in_background(Scripted([loading, Reply()]).serving) as api:
        assert bench("--base-url", api.url, "--num-prompts", 1)[0] == 0
        assert len(api.asked) == 3


def test_what_is_wrong_from_the_start_is_said_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with in_background(Scripted([Reply((b'{"error": {"message": "bad"}}',), 400)]).serving) as api:
        assert "the server answered 400: bad" in refusal(capsys, "--base-url", api.url)
        assert len(api.asked) == 1
    words = ("--base-url", api.url, "--ready-check-timeout-sec", 0)
    assert "the server cannot be reached" in refusal(capsys, *words)
    with in_background(Scripted(models=b'{"data": []}').serving) as api:
        assert "lists no model, expected one, or --model" in refusal(capsys, "--base-url", api.url)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-prompts 0", "--num-prompts is 0, expected at least 1"),
        ("--max-concurrency 0", "--max-concurrency is 0, expected at least 1"),
        ("--num-warmups -1", "--num-warmups is -1, expected at least 0"),
        ("--temperature -1", "--temperature is -1, expected at least 0"),
        ("--temperature nan", "--temperature is nan, expected at least 0"),
        ("--request-rate 0", "--request-rate is 0, expected more than 0"),
        ("--request-rate nan", "--request-rate is nan, expected more than 0"),
        ("--burstiness -2", "--burstiness is -2, expected more than 0"),
        ("--random-range-ratio 1", "--random-range-ratio is 1, expected 0 to less than 1"),
        ("--percentile-metrics ttft,tpt", "--percentile-metrics: found 'tpt', expected some of ttft"),
        ("--metric-percentiles 50,101", "--metric-percentiles: found '101', expected a number from 0 to 100"),
        ("--goodput itl:5", "--goodput: found 'itl', expected some of ttft, tpot, e2el"),
        ("--goodput ttft", "--goodput: found 'ttft', expected a number"),
        ("--extra-body [1]", "is no JSON object"),
        ("--header hunter2", "expected KEY=VALUE"),
        ("--metadata =5", "--metadata: found '=5', expected KEY=VALUE"),
        ("--dataset-name custom", "--dataset-name is custom, expected --dataset-path FILE"),
        ("--dataset-path x.jsonl", "--dataset-name is chat, which has no file"),
        ("--dataset-name custom --dataset-path /no/such", "cannot be read"),
        ("--endpoint /v1/completions", "--endpoint is /v1/completions, expected .../chat/completions"),
        ("--backend openai --endpoint /v1/chat/completions", "with --backend openai"),
        ("--backend tgi", "invalid choice: 'tgi'"),
        ("--base-url localhost:8000", "the server's URL is 'localhost:8000', expected http://HOST:PORT"),
        ("--base-url http://me:hunter3@host", "expected http://HOST:PORT"),
        ("--compare-blocks 3", "found --compare-blocks, expected --compare"),
        ("--compare http://x --max-concurrency 8 --compare-blocks 10", "expected at most 3"),
        ("--plot /no/such/place/a.png", "--plot"),
        ("--result-filename a.json", "found --result-filename, expected --save-result with it"),
        ("--requestrate 5", "did you mean --request-rate"),
    ],
)
def test_mistakes_are_told_before_anything_is_sent(
    words: str, message: str, scripted: Scripted, capsys: pytest.CaptureFixture[str]
) -> None:
    address = () if "--base-url" in words else ("--base-url", scripted.url)
    assert message in refusal(capsys, *address, *words.split())
    assert not scripted.asked


def test_a_picture(scripted: Scripted, bench: Bench, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "a.png"
    words = ("--base-url", scripted.url, "--num-prompts", 3, "--compare", scripted.url)
    assert bench(*words, "--plot", path)[0] == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    with in_background(
        Scripted([Reply(), Reply((DONE,))]).serving
    ) as api:  # nothing but the warm-up is answered
        assert bench("--base-url", api.url, "--num-prompts", 3, "--plot", path)[0] == 1


def test_without_matplotlib_there_is_no_picture_and_no_measurement(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    said = refusal(capsys, "--base-url", scripted.url, "--plot", tmp_path / "a.png")
    assert "--plot needs matplotlib: pip install 'haast[perf]'" in said
    assert not scripted.asked


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", "serve", "--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 110
    for title in ("server:", "prompts:", "traffic:", "sampling:", "result:"):
        assert title in out
    assert bench_serve.ABOUT in out
