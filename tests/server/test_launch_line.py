"""Published launch lines of other servers, with the program's name changed: what each becomes here."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.checkpoint.synthetic import write_head, write_target
from engine.checkpoint.synthetic_config import head_config
from engine.checkpoint.synthetic_tables import Layout
from engine.cli import compat, loading, main, options, serve
from engine.cli.speculative import asked
from engine.core import Speculation
from engine.errors import ConfigError
from engine.server.state import ServerOptions
from tests.checkpoint.files import write_hf
from tests.conftest import tiny_llama
from tests.engine.test_build_mistral import CONFIG, VOCAB
from tests.text.tekken import tekken_data

# Source: vLLM's recipe for the model and the model's card, word for word but for `vllm`, the number of GPUs
# and names that stand for directories here.
RECIPE = """haast serve mistralai/Mistral-Small-4-119B-2603 --max-model-len 262144 --tensor-parallel-size 1 \
    --attention-backend FLASH_ATTN_MLA --tool-call-parser mistral --enable-auto-tool-choice \
    --reasoning-parser mistral --max_num_batched_tokens 16384 --max_num_seqs 128 \
    --gpu_memory_utilization 0.8"""
WITH_HEAD = (
    RECIPE
    + """ --speculative_config '{
    "model": "mistralai/Mistral-Small-4-119B-2603-eagle",
    "num_speculative_tokens": 3,
    "method": "eagle",
    "max_model_len": "65536"
}'"""
)
NVFP4 = RECIPE.replace("FLASH_ATTN_MLA", "TRITON_MLA")
OTHER_CARDS = """haast serve mistralai/Mistral-Small-4-119B-2603 --tokenizer_mode mistral \
    --config_format mistral --load_format mistral --tool-call-parser mistral --enable-auto-tool-choice \
    --limit-mm-per-prompt '{"image": 0}' --no-enable-prefix-caching --revision main"""
SGLANG = """haast serve --model-path mistralai/Mistral-Small-4-119B-2603 --tp 1 --context-length 4096 \
    --mem-fraction-static 0.85 --max-running-requests 32 --speculative-algorithm EAGLE \
    --speculative-draft-model-path mistralai/Mistral-Small-4-119B-2603-eagle --speculative-num-steps 2 \
    --speculative-eagle-topk 1 --speculative-num-draft-tokens 3 --disable-cuda-graph --enable-metrics \
    --tool-call-parser mistral"""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A tiny pair that claims a million positions, as the published one does."""
    return write_long_pair(tmp_path_factory.mktemp("pair"), "native-fp8")


def write_long_pair(directory: Path, layout: Layout) -> tuple[str, str]:
    config = dataclasses.replace(CONFIG, max_position_embeddings=1 << 20)
    target, head = directory / "target", directory / "head"
    target.mkdir()
    head.mkdir()
    write_target(target, config, layout, seed=1)
    write_head(head, head_config(config), seed=2)
    (target / "tekken.json").write_text(json.dumps(tekken_data(VOCAB - 1000)))
    return str(target), str(head)


def words_of(line: str, pair: tuple[str, str]) -> list[str]:
    """The words behind ``haast serve``, hub names replaced by directories."""
    target, head = pair
    line = line.replace("mistralai/Mistral-Small-4-119B-2603-eagle", head)
    program, verb, *words = shlex.split(line.replace("mistralai/Mistral-Small-4-119B-2603", target))
    assert (program, verb) == ("haast", "serve")
    return words


def parse(*words: str) -> argparse.Namespace:
    parser = main.Parser(prog="haast serve")
    serve.add_arguments(parser)
    return parser.parse_args(words)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which wrong usage ends."""
    with pytest.raises(SystemExit) as caught:
        parse(*words)
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("haast serve: error: ")
    return str(line)


# --- whole lines


def test_kv_rows_in_fp8_are_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    args = parse("--kv-cache-dtype", "fp8", "--device", "cuda")
    monkeypatch.setattr(options, "device_name", str)
    assert options.engine_config(args).kv_dtype == torch.float8_e4m3fn
    auto = options.engine_config(parse("--device", "cuda", "--dtype", "bfloat16"))
    assert auto.kv_dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="kv_cache_dtype is float8_e4m3fn on cpu, expected a CUDA device"):
        options.engine_config(parse("--kv-cache-dtype", "fp8_e4m3", "--device", "cpu"))


@pytest.mark.parametrize("line", [RECIPE, WITH_HEAD, NVFP4])
def test_the_published_line(line: str, pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "has_fast_bfloat16", lambda: True)
    args = parse(*words_of(line, pair), "--device", "cpu")
    config = options.engine_config(args)
    assert options.model_name(args) == pair[0]
    assert (config.max_model_len, config.max_num_batched_tokens, config.max_num_seqs) == (262144, 16384, 128)
    assert (config.gpu_memory_utilization, config.kv_cache_memory) == (None, 1 << 30)  # there is no GPU
    assert serve.server_options(args) == ServerOptions()
    draft = asked(args)
    if line == WITH_HEAD:
        assert (draft.head, draft.method, config.draft_max_model_len) == (pair[1], "eagle", 65536)
        assert config.speculation == Speculation(4, 3, 4, lookup=3)
    else:
        assert (draft.head, config.draft_max_model_len, config.speculation) == (
            None,
            16384,
            Speculation(12, 5, 4, lookup=8),
        )
    [attention] = compat.notes_of(args)
    backend = "TRITON_MLA" if line == NVFP4 else "FLASH_ATTN_MLA"
    assert attention.startswith(f"--attention-backend {backend}: no effect")
    [memory] = options.notes(args, config)
    assert memory == (
        "--gpu-memory-utilization 0.8: no effect on a CPU; the KV cache may take 1.00 GiB (--kv-cache-memory)"
    )


def test_a_line_of_other_cards(pair: tuple[str, str]) -> None:
    args = parse(*words_of(OTHER_CARDS, pair))
    assert options.model_name(args) == pair[0]
    assert not options.engine_config(args).dummy_weights
    [images] = compat.notes_of(args)
    assert images == '--limit-mm-per-prompt {"image": 0}: no effect: requests with images are refused'


def test_a_line_for_sglang(pair: tuple[str, str]) -> None:
    args = parse(*words_of(SGLANG, pair), "--device", "cpu")
    config, draft = options.engine_config(args), asked(args)
    assert (options.model_name(args), draft.head, draft.method) == (*pair, "eagle")
    assert (config.max_model_len, config.max_num_seqs) == (4096, 32)
    assert config.speculation == Speculation(3, 2, 1, lookup=8)
    assert args.gpu_memory_utilization == 0.85
    assert not compat.notes_of(args)


def test_on_a_gpu_the_share_of_memory_counts(pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "device_name", lambda name: "cuda")
    args = parse(*words_of(RECIPE, pair))
    config = options.engine_config(args)
    assert config.gpu_memory_utilization == 0.8
    assert not options.notes(args, config)
    assert options.engine_config(parse()).gpu_memory_utilization == 0.9
    args = parse("--kv-cache-memory", "2GiB", "--gpu-memory-utilization", "0.5")
    config = options.engine_config(args)
    assert (config.gpu_memory_utilization, config.kv_cache_memory) == (None, 2 << 30)
    assert "no effect with --kv-cache-memory" in options.notes(args, config)[0]
    for share in ("0", "1.5", "nan"):
        with pytest.raises(ConfigError, match="--gpu-memory-utilization is .*, expected more than 0"):
            options.engine_config(parse("--gpu-memory-utilization", share))


def test_two_gpus_are_refused(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = words_of(WITH_HEAD.replace("--tensor-parallel-size 1", "--tensor-parallel-size 2"), pair)
    assert refusal(capsys, *words) == (
        "haast serve: error: --tensor-parallel-size 2: haast runs on one GPU: leave the flag out; `haast "
        "check MODEL` says which GPUs hold the model alone, Mistral Small 4 in FP8 an H200 or B200, in NVFP4 "
        "already an H100 with 80 GB"
    )


def test_a_context_longer_than_the_models(pair: tuple[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", pair[0], "--max-model-len", "2000000", "-i", __file__, "-o", "/dev/null"]
    assert main.main(words) == 1
    said = capsys.readouterr().err
    assert "max_model_len is 2000000, but target was made for at most 1048576 positions" in said


def test_two_models_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="found the model a and --model b, expected one of them"):
        options.model_name(parse("a", "--model", "b"))
    assert options.model_name(parse("a", "--model", "a")) == "a"
    monkeypatch.setenv("HAAST_MODEL", "b")
    assert options.model_name(parse("a")) == "a"
    assert options.model_name(parse()) == "b"


def test_the_start_says_what_is_not_default(
    pair: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def ends_at_once(*args: object) -> int:
        return 0

    monkeypatch.setattr(serve, "serve", ends_at_once)
    monkeypatch.setattr(logging, "basicConfig", lambda **settings: None)
    monkeypatch.setenv("HAAST_MAX_NUM_QUEUED_REQS", "7")
    monkeypatch.setenv("HAAST_MODEL", "other")
    caplog.set_level(logging.INFO, logger="haast")
    words = [*words_of(RECIPE, pair), "--device", "cpu", "--api-key", "secret", "--api-key", "too"]
    assert main.main(["serve", *words, "--port", "8000"]) == 0
    version, given, *notes = caplog.messages
    assert version.startswith("haast ")
    assert "CPU with" in version
    assert given == (
        "Non-default arguments: --device cpu (flag), --max-model-len 262144 (flag), --max-num-seqs 128 "
        "(flag), --max-num-batched-tokens 16384 (flag), --gpu-memory-utilization 0.8 (flag), --api-key *** "
        "(flag), --max-num-queued-reqs 7 (HAAST_MAX_NUM_QUEUED_REQS), --tensor-parallel-size 1 (flag), "
        "--enable-auto-tool-choice (flag), --tool-call-parser mistral (flag), --reasoning-parser mistral "
        "(flag), --attention-backend FLASH_ATTN_MLA (flag)"
    )
    assert [note.split(":")[0] for note in notes] == [
        "--attention-backend FLASH_ATTN_MLA",
        "--gpu-memory-utilization 0.8",
    ]


# --- the table

ONE_GPU = "haast runs on one GPU"
VERDICTS: dict[str, str] = {  # written by hand, from what people launch: "", "note", or what a refusal says
    "-tp 1": "",
    "-tp=2": ONE_GPU,
    "--tp 4": ONE_GPU,
    "--pipeline-parallel-size 1": "",
    "--pipeline_parallel_size 2": ONE_GPU,
    "--data-parallel-size=1": "",
    "--data-parallel-size=8": ONE_GPU,
    "--enable-auto-tool-choice": "",
    "--tool-call-parser mistral": "",
    "--tool-call-parser hermes": "use mistral",
    "--reasoning-parser mistral": "",
    "--enable-per-request-metrics": "",
    "--tokenizer-mode auto": "",
    "--tokenizer_mode=mistral": "",
    "--tokenizer-mode slow": "use auto",
    "--config-format auto": "",
    "--config-format hf": "use auto",
    "--enforce-eager": "",
    "--disable-cuda-graph": "",
    "--disable-log-stats": "note",
    "--attention-backend FLASHINFER_MLA": "note",
    "--seed 0": "note",
    "--trust-remote-code": "no code from a checkpoint is ever run",
    "--kv-cache-dtype auto": "",
    "--enable-lora": "merge them",
    "--lora-modules a=b c=d": "merge them",
    "--chat-template my.jinja": "the checkpoint's own",
    "--enable-prefix-caching": "",
    "--no-enable-prefix-caching": "",
    "--revision abc": "--local-dir DIR",
    "--max-num-queued-tokens 9": "",
    "--max-queued-requests 9": "",
    "--scheduling-policy priority": "",
    "--enable-request-id-headers": "",
    "--allowed-origins '[\"*\"]'": "use --cors-origin",
    "--uds /tmp/x": "--host and --port",
}


@pytest.mark.parametrize("line", VERDICTS)
def test_verdicts(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    verdict, words = VERDICTS[line], shlex.split(line)
    if verdict in ("", "note"):
        assert len(compat.notes_of(parse(*words))) == (verdict == "note")
    else:
        assert verdict in refusal(capsys, *words)


@pytest.mark.parametrize("row", compat.TABLE, ids=lambda row: row.flags[0])
def test_every_row_does_what_it_says(row: compat.Row, capsys: pytest.CaptureFixture[str]) -> None:
    for flag in row.flags:
        for value in row.silent:
            assert not compat.notes_of(parse(flag, value))
            assert not compat.notes_of(parse(f"{flag}={value.upper()}"))
        words = [flag] if row.takes == "nothing" else [flag, "any value"]
        said = f"{' '.join(words)}: {row.sentence}"
        if row.otherwise == "refuse":
            assert refusal(capsys, *words) == f"haast serve: error: {said}"
        else:
            assert compat.notes_of(parse(*words)) == ([said] if row.otherwise == "note" else [])
    assert not row.sentence.endswith(".")
    assert "%" not in row.sentence  # argparse would read it


# --- the checkpoint's kind


@pytest.mark.parametrize(
    ("layout", "right", "wrong"),
    [("native-fp8", ("fp8",), "nvfp4"), ("native-nvfp4", ("nvfp4", "compressed-tensors"), "fp8")],
)
def test_quantization_is_compared_with_the_files(
    tmp_path: Path, layout: Layout, right: tuple[str, ...], wrong: str
) -> None:
    target, _ = write_long_pair(tmp_path, layout)
    for name in right:
        loading.check_quantization(name.upper(), target)
    with pytest.raises(ConfigError, match=f"is '{wrong}', but .* is stored as {right[0]}; .* leave the flag"):
        loading.check_quantization(wrong, target)
    with pytest.raises(ConfigError, match="--quantization is 'awq', expected fp8, nvfp4"):
        loading.check_quantization("awq", target)


def test_quantization_of_what_has_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama = str(write_hf(tmp_path / "m", *tiny_llama()))
    built: list[Any] = []
    monkeypatch.setattr(loading, "build", lambda *args: built.append(args))
    for words in ((llama,), ()):
        with pytest.raises(ConfigError, match="is stored as neither FP8 nor NVFP4"):
            loading.open_engine(parse(*words, "--quantization", "fp8"))
    assert not built


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("cuda:1", "--device is 'cuda:1', expected cuda, with CUDA_VISIBLE_DEVICES=1"),
        ("mps", "--device is 'mps', expected cpu or cuda"),
    ],
)
def test_other_devices_are_refused(device: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels would be launched on the first GPU, whatever the tensors lie on."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match=message):
        options.device_name(device)
    assert options.device_name("cuda:0") == "cuda:0"
