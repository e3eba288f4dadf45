"""``haast synth``: pairs that readers and the engine understand, sizes, and what it refuses to do."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.build import build, open_head
from engine.checkpoint import open_model
from engine.checkpoint.synthetic_config import SMALL_4, TINY, head_config
from engine.checkpoint.synthetic_tables import LAYOUTS, Layout, head_table, target_table
from engine.cli import main, options, serve
from engine.cli.synth import SIZES
from engine.errors import CheckpointError
from tests.checkpoint.mistral_files import read_all, same_bits
from tests.text.tekken import tekken_data


def synth(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main.main(["synth", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main.main(["synth", *map(str, words)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    return said.err


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiny_pairs_are_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Layout) -> None:
    target, head = tmp_path / "new" / "target", tmp_path / "new" / "target-eagle"
    said = synth(capsys, target, "--layout", layout, "--head-dir", head)
    assert said[0].startswith(f"{target}: {layout}, 2 layers, ")
    assert said[0].endswith("MB in 1 file, random numbers")
    assert said[2].startswith(f"Serving needs {target / 'tekken.json'}; write again with --tekken")
    checkpoint = open_model(target)
    assert checkpoint.config == TINY
    assert checkpoint.load(torch.float32, "cpu")
    opened = open_head(str(head))
    assert opened.config == head_config(TINY)
    stored = read_all(head)["eagle_linear.weight"].dtype
    assert stored == (torch.bfloat16 if layout.endswith("bf16") else torch.float8_e4m3fn)
    assert main.main(["check", str(target), "--spec-model", str(head), "--json"]) == 0


def test_a_seed_is_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        synth(capsys, tmp_path / name, "--seed", seed)
    first, same, other = (read_all(tmp_path / name) for name in "abc")
    assert all(same_bits(tensor, same[name]) for name, tensor in first.items())
    assert not same_bits(first["output.weight"], other["output.weight"])


def test_a_pair_with_a_tokenizer_is_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded with exactly the flags of the launch line that the command ends with."""
    target, head, tekken = tmp_path / "t", tmp_path / "h", tmp_path / "my-tekken.json"
    tekken.write_text(json.dumps(tekken_data(num_vocab=300)))
    said = synth(capsys, target, "--head-dir", head, "--tekken", tekken, "--layout", "native-nvfp4")
    assert (target / "tekken.json").read_bytes() == tekken.read_bytes()
    program, verb, *words = said[-1].split()
    assert (program, verb) == ("haast", "serve")
    parser = main.Parser()
    serve.add_arguments(parser)
    args = parser.parse_args([*words, "--device", "cpu", "--kv-cache-memory", "64MiB"])
    served = build(args.model, args.spec_model, options.engine_config(args))
    assert served.tokenizer.vocab_size == 1_300 == open_model(target).config.vocab_size
    assert served.draft_name == "eagle (h)"
    assert served.engine.config.max_model_len == TINY.max_position_embeddings


def test_headers_with_a_tokenizer_are_served_as_a_dummy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target, head, tekken = tmp_path / "t", tmp_path / "h", tmp_path / "my-tekken.json"
    tekken.write_text(json.dumps(tekken_data(num_vocab=300)))
    said = synth(capsys, target, "--head-dir", head, "--tekken", tekken, "--headers-only")
    assert said[-2] == f"haast check {target} --spec-model {head}"
    assert said[-1].startswith(f"haast serve {target} --spec-model {head} --load-format dummy ")
    parser = main.Parser()
    serve.add_arguments(parser)
    args = parser.parse_args([*said[-1].split()[2:], "--device", "cpu", "--kv-cache-memory", "64MiB"])
    config = options.engine_config(args)
    served = build(args.model, args.spec_model, config)
    assert served.engine.target.embedding.any()
    with pytest.raises(CheckpointError, match="holds the scale 0.0, expected a positive number"):
        build(args.model, args.spec_model, dataclasses.replace(config, dummy_weights=False))


def test_the_size_in_between_is_about_4_gb() -> None:
    """By its table; a gigabyte takes ten seconds to make."""
    size = SIZES["4gb"]
    num_bytes = sum(spec.num_bytes for spec in target_table(size.config, "native-fp8").values())
    assert 3.9e9 < num_bytes < 4.3e9
    assert size.config.vocab_size == SMALL_4.vocab_size
    assert size.num_shards == 4
    assert len(head_table(head_config(size.config))) == 60


@pytest.mark.parametrize(("layout", "num_shards"), [("hf-fp8", 3), ("hf-bf16", 14)])
def test_full_size_means_headers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: Layout, num_shards: int
) -> None:
    target, head = tmp_path / "t", tmp_path / "h"
    said = synth(capsys, target, "--size", "full", "--layout", layout, "--head-dir", head)
    assert said[0].endswith(f"MB in {num_shards} files, headers only, the data are holes")
    assert said[-1] == f"haast check {target} --spec-model {head}"
    files = list(target.glob("*.safetensors"))
    assert len(files) == num_shards
    assert sum(file.stat().st_size for file in files) > 120e9
    assert sum(file.stat().st_blocks * 512 for file in files) < 1e7
    assert open_model(target).config == SMALL_4


def test_headers_of_a_small_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    [said, _] = synth(capsys, tmp_path / "t", "--headers-only")
    assert "headers only" in said
    assert not read_all(tmp_path / "t")["output.weight"].any()


def test_refusals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    full, empty, file = tmp_path / "full", tmp_path / "empty", tmp_path / "file"
    full.mkdir()
    empty.mkdir()
    (full / "notes.txt").touch()
    file.touch()
    for words in ([full], [empty, "--head-dir", full]):
        assert "found notes.txt, expected a new or empty directory" in refusal(capsys, *words)
    assert "found a file, expected a new or empty directory" in refusal(capsys, file)
    assert "expected another directory than the target's" in refusal(capsys, empty, "--head-dir", empty)
    assert "--tekken nothing: no such file" in refusal(capsys, empty, "--tekken", "nothing")
    assert "expected one of them" in refusal(capsys, empty, "--headers-only", "--yes-write-everything")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=100e9))
    everything = [empty, "--size", "full", "--yes-write-everything"]
    assert "120.9 GB are to be written, found 100.0 GB of free space" in refusal(capsys, *everything)
    assert not list(empty.iterdir())
