"""``haast check``: published totals, floors of the roofline calculation, what fits, and the launch line."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFWriter
from safetensors.torch import load_file, save_file

from engine.build import DEFAULT_HEAD, default_model_path, open_head
from engine.checkpoint.gguf import llama3_factors
from engine.checkpoint.synthetic import write_head, write_headers, write_target
from engine.checkpoint.synthetic_config import SMALL_4, SMALL_4_VISION, TINY, TINY_VISION, head_config
from engine.checkpoint.synthetic_tables import Layout
from engine.cli import main, options, serve
from engine.cli.roofline import GPUS
from engine.config import LlamaConfig, Mistral4Config, RopeScaling
from engine.memory import num_pages
from tests.checkpoint.files import write_gguf, write_hf
from tests.conftest import tiny_eagle3, tiny_llama

SHARDS: dict[Layout, int] = {"native-fp8": 7, "native-nvfp4": 13, "hf-fp8": 3}

# Source: the project's roofline calculation, independent of this code: milliseconds of a step that scores
# 1, 2, 4 and 8 tokens, batch 1, context 1,024, independent uniform routing.
FLOORS = {
    ("H100 80GB", "fp8"): (1.9925, 3.0404, 5.0412, 8.6864),
    ("H100 80GB", "nvfp4"): (1.7023, 2.2918, 3.4181, 5.4725),
    ("H200 141GB", "fp8"): (1.3906, 2.1219, 3.5211, 6.0679),
    ("H200 141GB", "nvfp4"): (1.1881, 1.5995, 2.3883, 3.8249),
    ("B200 180GB", "fp8"): (0.8343, 1.2732, 2.1112, 3.6378),
    ("B200 180GB", "nvfp4"): (0.7128, 0.9597, 1.4315, 2.2920),
}


def check(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    assert main.main(["check", *map(str, words), "--json"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    report: dict[str, Any] = json.loads(line)
    return report


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert main.main(["check", *map(str, words)]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("haast: error: ")
    assert len(said.err.splitlines()) == 1
    return said.err


def groups(part: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {group["name"]: group for group in part["groups"]}


def fits(report: dict[str, Any], gpu: str) -> dict[int, dict[str, Any]]:
    [on] = [on for on in report["gpus"] if on["gpu"]["name"] == gpu]
    return {fit["num_gpus"]: fit for fit in on["fits"]}


@pytest.fixture(scope="module", params=list(SHARDS))
def published(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Layout, Path, Path]:
    """Headers of the full-size pair in one layout: (layout, target, head)."""
    layout: Layout = request.param
    root = tmp_path_factory.mktemp(layout)
    write_headers(root / "t", SMALL_4, layout, vision=SMALL_4_VISION, num_shards=SHARDS[layout])
    return layout, root / "t", write_headers(root / "h", head_config(SMALL_4), "native-fp8")


def test_the_published_pair(published: tuple[Layout, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """One run of the command on each layout, for reading the headers is what takes time."""
    layout, target, head = published
    report = check(capsys, target, "--spec-model", head)
    said, found = report["target"], groups(report["target"])
    assert said["architecture"] == "Mistral Small 4"
    assert (said["num_layers"], said["num_experts"], said["num_experts_per_token"]) == (36, 128, 4)
    assert (said["context"], said["kv_bytes_per_token"]) == (1_048_576, 23_040)

    # CHECKPOINT 1.4: every group, and what they sum to
    assert {name: group["parameters"] for name, group in found.items() if name != "scales"} == {
        "routed experts": 115_964_116_992,
        "shared experts": 905_969_664,
        "attention": 1_009_778_688,
        "embeddings and output": 1_073_741_824,
        "norms and router": 345_088 + 18_874_368,
        "vision, not loaded": 428_472_320,
    }
    assert said["parameters"] == 117_879_865_344 + 1_521_433_600
    assert said["stored_bytes"] == sum(group["stored_bytes"] for group in said["groups"])
    assert said["memory_bytes"] == sum(group["memory_bytes"] for group in said["groups"])
    num_scales = found["scales"]["parameters"]
    in_files = sum(file.stat().st_size for file in target.glob("*.safetensors"))
    assert 0 < in_files - said["stored_bytes"] < 8_000_000  # headers

    if layout == "native-nvfp4":
        blocks = (115_964_116_992 + 905_969_664) // 16
        assert said["elements"]["U8"] == 8 * blocks
        assert said["elements"]["F8_E4M3"] == blocks
        assert num_scales == blocks + 36 * 129 * 3 * 2  # two numbers a matrix, one of them not loaded
        assert said["stored_bytes"] == 70_801_959_560
        assert found["routed experts"]["stored_as"] == ["NVFP4"]
        assert found["attention"]["stored_as"] == ["BF16"]
        assert found["attention"]["memory_bytes"] == 2 * 1_009_778_688
    else:
        assert said["elements"]["F8_E4M3"] == 117_879_865_344
        assert said["elements"]["BF16"] == 1_521_433_600 + num_scales
        assert found["attention"]["stored_as"] == found["routed experts"]["stored_as"] == ["FP8"]
        # fused: gate and up share theirs. 36 * (4 * 128 + 16) make the published index's total
        assert num_scales == (36 * 528 if layout == "hf-fp8" else 36 * (5 + 3 + 384) * 2)
        assert found["scales"]["memory_bytes"] == 36 * (5 + 3 + 384) * 2 * 4  # shared ones are there twice
        if layout == "hf-fp8":
            assert said["parameters"] + num_scales == 119_401_317_952
    assert found["vision, not loaded"]["memory_bytes"] == 0

    of_head = groups(report["head"])
    assert report["head"]["kv_bytes_per_token"] == 1_280
    assert report["head"]["elements"]["F8_E4M3"] == 391_643_136
    assert of_head["input projection"]["parameters"] == 4096 * 8192
    assert of_head["dense MLP"]["parameters"] == 2 * 3 * 4096 * 12288
    assert report["output_rows_bytes"] == 32_768 * (4_096 + 4)  # in FP8, a scale for every row

    for gpu, form in FLOORS:
        if form == layout.partition("-")[2]:
            [on] = [on for on in report["gpus"] if on["gpu"]["name"] == gpu]
            assert list(on["floor_ms"].values()) == pytest.approx(FLOORS[gpu, form], rel=0.01), gpu
            # the head's layers and 32,768 rows of the output, all in FP8, from the same calculation
            assert on["draft_floor_ms"] == pytest.approx(0.15741 * 3.35e12 / on["gpu"]["bandwidth"], rel=0.01)
    _check_fits(layout, report, target, head)


def _check_fits(layout: Layout, report: dict[str, Any], target: Path, head: Path) -> None:
    h100, h200 = fits(report, "H100 80GB"), fits(report, "H200 141GB")
    assert h200[1]["fits"]
    assert h100[1]["fits"] == (layout == "native-nvfp4")
    assert (h100[1]["served"], h100[2]["served"]) == (True, False)
    for on in report["gpus"]:
        tokens = [fit["kv_tokens"] for fit in on["fits"]]
        assert tokens == sorted(tokens)
        for fit in on["fits"]:
            usable = 0.9 * on["gpu"]["memory_bytes"] - 2e9
            weights = report["target"]["memory_bytes"] + report["head"]["memory_bytes"] + 32_768 * 4_100
            left = (usable - weights / fit["num_gpus"]) / (23_040 + 1_280)  # latent rows are whole on each
            assert fit["fits"] == (fit["kv_tokens"] > 0) == (left > 2_048 + 16)
            assert not fit["fits"] or left - 32 <= fit["kv_tokens"] <= left
    assert report["launch_gpu"] == ("H100 80GB" if layout == "native-nvfp4" else "H200 141GB")
    _check_launch(report, SMALL_4, target, head)


def _check_launch(
    report: dict[str, Any], model: LlamaConfig | Mistral4Config, target: Path, head: Path | None = None
) -> None:
    """The launch line is understood by serve, fits the GPU it names and holds a sequence at full length."""
    program, verb, *words = report["launch"].split()
    assert (program, verb) == ("haast", "serve")
    parser = main.Parser()
    serve.add_arguments(parser)
    args = parser.parse_args([*words, "--device", "cpu", "--dtype", "bfloat16"])
    config = options.engine_config(args)
    assert (args.model, args.spec_model) == (str(target), None if head is None else str(head))
    draft = "none" if head is None else open_head(str(head))
    num_slots = num_pages(model, draft, config) * config.page_size
    assert num_slots > config.max_model_len  # refused otherwise
    parts = [part for part in (report["target"], report["head"]) if part is not None]
    [gpu] = [gpu for gpu in GPUS if gpu.name == report["launch_gpu"]]
    weights = sum(part["memory_bytes"] for part in parts) + report["output_rows_bytes"]
    left = 0.9 * gpu.memory_bytes - 2e9 - weights
    kv_bytes = sum(part["kv_bytes_per_token"] for part in parts)
    assert config.kv_cache_memory <= left
    # none of it is in vain; and more would be, or is not there
    assert num_slots * kv_bytes == config.kv_cache_memory
    unlimited = num_pages(model, draft, dataclasses.replace(config, kv_cache_memory=1 << 50))
    assert num_slots == min(unlimited, int(left) // (kv_bytes * config.page_size)) * config.page_size


def test_a_llama_in_every_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, weights = tiny_llama(vocab_size=300, num_layers=2)
    numbers = sum(weight.numel() for weight in weights.values())
    places = {
        "GGUF": write_gguf(tmp_path / "m.gguf", config, weights),
        "Hugging Face's, config.json": write_hf(tmp_path / "hf", config, weights),
    }
    for form, place in places.items():
        report = check(capsys, place)
        said = report["target"]
        assert (said["architecture"], said["format"], said["num_experts"]) == ("Llama", form, 0)
        assert said["parameters"] == numbers == sum(group["parameters"] for group in said["groups"])
        assert said["memory_bytes"] == 2 * numbers
        assert said["kv_bytes_per_token"] == 2 * 2 * config.num_kv_heads * config.head_dim * 2
        assert groups(said)["embeddings and output"]["parameters"] == 2 * 300 * 32
        assert report["tokens_needed"] == config.max_position_embeddings == 512
        # all of it but the embedding, of which each token reads a row; and the cached rows
        read = 2 * (numbers - 300 * 32) + 4 * 2 * 32 + 1024 * said["kv_bytes_per_token"]
        for on in report["gpus"]:
            assert on["floor_ms"]["4"] == pytest.approx(1e3 * read / on["gpu"]["bandwidth"])
        _check_launch(report, config, place)
    assert groups(said)["attention"]["stored_bytes"] == 4 * groups(said)["attention"]["parameters"]
    assert "--max-model-len 512 " in report["launch"]


@pytest.mark.parametrize(("quant", "block_bytes"), [("Q8_0", 34), ("Q4_0", 18), ("F16", 64)])
def test_groups_of_a_gguf_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quant: str, block_bytes: int
) -> None:
    """Bytes of 32 numbers are those of the format's description; norms are whole floats."""
    config, weights = tiny_llama(vocab_size=300, num_layers=2, intermediate_size=64)
    file = write_gguf(tmp_path / "m.gguf", config, weights, quant)
    said = check(capsys, file)["target"]
    found = groups(said)
    of_group = {
        "attention": 2 * (2 * 32 * 32 + 2 * 16 * 32),
        "dense MLP": 2 * 3 * 32 * 64,
        "embeddings and output": 2 * 300 * 32,
    }
    for name, numbers in of_group.items():
        assert (found[name]["parameters"], found[name]["stored_as"]) == (numbers, [quant])
        assert found[name]["stored_bytes"] * 32 == numbers * block_bytes
        assert found[name]["memory_bytes"] == 2 * numbers
    norms = 5 * 32
    assert found["norms and router"]["stored_bytes"] == 4 * norms
    assert found.keys() == of_group.keys() | {"norms and router"}
    assert said["elements"] == {"F32": norms, quant: sum(of_group.values())}
    assert said["stored_bytes"] == sum(group["stored_bytes"] for group in said["groups"])
    assert 0 < file.stat().st_size - said["stored_bytes"] < 20_000
    assert main.main(["check", str(file)]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "attention" in line]
    assert quant in row
    assert "6,144" in row


def test_what_a_llama_does_not_load_is_counted_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tied output stored twice, an old file's frequencies, a GGUF file's rotary factors."""
    config, weights = tiny_llama(tie_word_embeddings=True)
    numbers = sum(weight.numel() for weight in weights.values())
    extra = {
        "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(4),
    }
    said = check(capsys, write_hf(tmp_path / "hf", config, weights | extra, num_shards=2))["target"]
    assert (said["parameters"], said["memory_bytes"]) == (numbers, 2 * numbers)
    assert said["stored_bytes"] == 4 * (numbers + 97 * 32 + 4)
    apart = groups(said)["not loaded"]
    assert (apart["parameters"], apart["stored_bytes"], apart["memory_bytes"]) == (
        97 * 32 + 4, 4 * (97 * 32 + 4), 0,
    )  # fmt: skip

    config, weights = tiny_llama(vocab_size=300, rope_theta=500_000.0)
    numbers = sum(weight.numel() for weight in weights.values())
    factors = llama3_factors(RopeScaling(8.0, 1.0, 4.0, 8192), config.head_dim, config.rope_theta)

    def add(writer: GGUFWriter) -> None:
        writer.add_tensor("rope_freqs.weight", factors.astype(np.float32))

    said = check(capsys, write_gguf(tmp_path / "m.gguf", config, weights, change=add))["target"]
    assert (said["parameters"], said["memory_bytes"]) == (numbers, 2 * numbers)
    assert groups(said)["not loaded"]["stored_bytes"] == 4 * config.head_dim // 2


def test_kv_heads_are_split_and_tied_embeddings_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, weights = tiny_llama(tie_word_embeddings=True)
    report = check(capsys, write_hf(tmp_path, config, weights))
    one, two, four = (fits(report, "H200 141GB")[n]["kv_tokens"] for n in (1, 2, 4))
    assert two == pytest.approx(2 * one, rel=1e-3)
    assert four == pytest.approx(two, rel=1e-3)  # two heads do not divide further
    numbers = sum(weight.numel() for weight in weights.values())
    read = 2 * numbers + 2 * 32 + 1024 * report["target"]["kv_bytes_per_token"]
    assert report["gpus"][0]["floor_ms"]["1"] == pytest.approx(1e3 * read / GPUS[0].bandwidth)


def test_a_published_head_of_a_llama(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, weights = tiny_llama()
    target = write_hf(tmp_path / "target", config, weights)
    raw, tensors = tiny_eagle3(config)
    head = tmp_path / "head"
    head.mkdir()
    (head / "config.json").write_text(json.dumps(raw))
    save_file(tensors, head / "model.safetensors")
    report = check(capsys, target, "--spec-model", head)
    found = groups(report["head"])
    assert report["head"]["architecture"] == "EAGLE-3 head"
    loaded = [tensor.numel() for name, tensor in tensors.items() if name != "t2d"]
    assert report["head"]["parameters"] == sum(loaded)
    assert found["embeddings and output"]["parameters"] == tensors["lm_head.weight"].numel()
    assert found["not loaded"]["memory_bytes"] == 0
    assert report["output_rows_bytes"] == 0
    del tensors["lm_head.weight"]  # then it is cut out of the target's
    save_file(tensors, head / "model.safetensors")
    assert check(capsys, target, "--spec-model", head)["output_rows_bytes"] == 61 * 32 * 2
    del tensors["fc.weight"]
    save_file(tensors, head / "model.safetensors")
    assert "missing tensors ['fc.weight']" in refusal(capsys, target, "--spec-model", head)
    (head / "model.safetensors").unlink()
    assert "no *.safetensors file" in refusal(capsys, target, "--spec-model", head)


def test_the_default_pair(capsys: pytest.CaptureFixture[str]) -> None:
    report = check(capsys)
    assert report["target"]["name"] == "SmolLM2-135M-Instruct"
    assert report["target"]["parameters"] == 134_515_008
    file_bytes = default_model_path().stat().st_size
    assert 0 < file_bytes - report["target"]["stored_bytes"] < 2_500_000  # the tokenizer, metadata
    found = groups(report["target"])
    assert sum(group["stored_bytes"] for group in found.values()) == report["target"]["stored_bytes"]
    assert found["attention"]["stored_as"] == ["Q4_1"]
    assert found["attention"]["stored_bytes"] * 32 == found["attention"]["parameters"] * 20
    assert found["norms and router"]["stored_as"] == ["F32"]
    assert report["head"]["name"] == DEFAULT_HEAD.name
    assert report["launch"].startswith("haast serve --max-model-len 8192 ")


def test_the_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_target(tmp_path / "t[red]", TINY, "native-nvfp4", vision=TINY_VISION)
    head = write_head(tmp_path / "h", head_config(TINY), "native-fp8")
    assert main.main(["check", str(target), "--spec-model", str(head)]) == 0
    said = capsys.readouterr().out
    for text in (
        "t[red]: Mistral Small 4 (Mistral's, params.json)",
        "2 layers, width 64, 8 experts a layer, 2 a token, vocabulary 512, context 512",
        "h: Eagle head of Mistral Small 4",
        "KV cache: 128 bytes a token, and 128 for the head",
        "* Several GPUs are not served yet",
        "A bound, not a forecast",
        "On one L40S 48GB:\n  haast serve ",
        "vision, not loaded",
        "RTX PRO 6000 96GB",
    ):
        assert text in said, text
    assert max(map(len, said.splitlines()[:-2])) <= 80


def test_lengths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, weights = tiny_llama(max_position_embeddings=100_000)
    target = write_hf(tmp_path, config, weights)
    assert "--max-model-len 32768 " in check(capsys, target)["launch"]
    report = check(capsys, target, "--max-model-len", 70_001)
    assert report["tokens_needed"] == 70_001
    assert "--max-model-len 70001 " in report["launch"]
    _check_launch(report, config, target)
    for wrong in (0, 100_001):
        message = refusal(capsys, target, "--max-model-len", wrong)
        assert f"--max-model-len is {wrong}, expected 1 to the 100000 positions" in message


def test_kv_rows_in_fp8(capsys: pytest.CaptureFixture[str]) -> None:
    """The target's rows are half as large, the head's are not, and the launch line says so."""
    wide, narrow = check(capsys), check(capsys, "--kv-cache-dtype", "fp8")
    assert narrow["target"]["kv_bytes_per_token"] * 2 == wide["target"]["kv_bytes_per_token"]
    assert narrow["head"] == wide["head"]
    assert " --kv-cache-dtype fp8 " in narrow["launch"]
    assert fits(narrow, "H200 141GB")[1]["kv_tokens"] > 1.8 * fits(wide, "H200 141GB")[1]["kv_tokens"]


def test_what_fits_nothing_has_no_launch_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = write_headers(tmp_path, SMALL_4, "hf-bf16", num_shards=2)
    report = check(capsys, target)
    assert (report["launch"], report["launch_gpu"]) == (None, None)
    assert not fits(report, "H200 141GB")[1]["fits"]
    assert fits(report, "H200 141GB")[2]["fits"]
    assert main.main(["check", str(target)]) == 0
    assert "None of these GPUs holds it alone" in capsys.readouterr().out


def test_broken_checkpoints_are_the_readers_errors(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = write_target(tmp_path / "t", TINY, "native-fp8")
    head = write_head(tmp_path / "h", head_config(TINY))
    other = write_head(tmp_path / "o", head_config(TINY, num_layers=1))
    file = target / "consolidated.safetensors"
    assert "no such file or directory" in refusal(capsys, tmp_path / "nowhere")
    assert "'moe' is missing" in refusal(capsys, head)  # a head is no target
    params = json.loads((other / "params.json").read_text()) | {"vocab_size": 511}
    (other / "params.json").write_text(json.dumps(params))
    assert "its vocab_size is 511, the target's 512" in refusal(capsys, target, "--spec-model", other)
    config, weights = tiny_llama()
    llama = write_hf(tmp_path / "llama", config, weights)
    assert "found a Llama target" in refusal(capsys, llama, "--spec-model", head)
    tensors = load_file(file)
    shutil.copytree(target, tmp_path / "gap")
    del tensors["norm.weight"]
    save_file(tensors, tmp_path / "gap" / file.name)
    assert "1 of " in (said := refusal(capsys, tmp_path / "gap"))
    assert "norm.weight" in said
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size - 1)
    assert "not a complete safetensors file" in refusal(capsys, target)
