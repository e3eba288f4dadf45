"""Models without weights: the plan of real files, with numbers of sane size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.build import build, open_head
from engine.checkpoint import dummy, open_model
from engine.checkpoint.dummy import DummyMistral, open_dummy
from engine.checkpoint.mistral_hf import MistralHfCheckpoint
from engine.checkpoint.native import MistralHead, NativeCheckpoint, read_mistral_head
from engine.checkpoint.plan import Planned
from engine.checkpoint.synthetic import write_head, write_target
from engine.checkpoint.synthetic_config import SMALL_4, SMALL_4_VISION, TINY, TINY_VISION, head_config
from engine.checkpoint.synthetic_tables import HEAD_LAYOUTS, LAYOUTS, Layout
from engine.errors import CheckpointError, ConfigError
from engine.nn.weight import Fp8Weight, Nvfp4Weight
from tests.checkpoint.dummies import CONFIG, describe, dummy_pair, settings, tensors
from tests.checkpoint.files import write_gguf, write_hf
from tests.checkpoint.mistral_files import edit_json, same_bits, wide
from tests.conftest import tiny_llama

FP8_ELEMENTS, NVFP4_ELEMENTS = 117_879_865_344, 115_964_116_992 + 905_969_664
BF16_ELEMENTS = 1_521_433_600 - 428_472_320  # without the vision encoder, which is not loaded


def without_weights(directory: Path) -> Path:
    """The same directory with its configuration only."""
    for file in directory.glob("*.safetensors"):
        file.unlink()
    return directory


# --- what is filled


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dummy_is_planned_like_the_files(tmp_path: Path, layout: Layout) -> None:
    """Same weights, kinds and tensors, in shape and type, as a reader delivers from the layout's files."""
    files = write_target(tmp_path / "files", CONFIG, layout, vision=TINY_VISION)
    real = open_model(files)
    assert isinstance(real, NativeCheckpoint | MistralHfCheckpoint)
    loaded = tensors(real.load(torch.bfloat16, "cpu"))
    opened = open_dummy(without_weights(files))
    assert isinstance(opened, DummyMistral)
    assert (opened.name, opened.path, opened.config) == (real.name, real.path, real.config)
    assert dict(opened.plan.weights) == dict(real.plan.weights)
    filled = tensors(opened.load(torch.bfloat16, "cpu"))
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in filled.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in loaded.items()
    }
    assert not any(same_bits(tensor, loaded[name]) for name, tensor in filled.items() if tensor.dim() > 1)


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_a_dummy_head_is_planned_like_the_file(tmp_path: Path, layout: Layout) -> None:
    files = write_head(tmp_path / "files", head_config(CONFIG), layout)
    real = read_mistral_head(files)
    opened = open_head(str(without_weights(files)), dummy=True)
    assert isinstance(opened, MistralHead)
    assert dict(opened.plan.weights) == dict(real.plan.weights)
    assert opened.config == real.config
    assert opened.load(torch.float32, "cpu").keys() == real.plan.weights.keys()


def test_dynamic_activations_have_no_scales(tmp_path: Path) -> None:
    for layout, keys in (
        ("native-fp8", {"quantization": {"qscheme_act": "NO_SCALES"}}),
        ("hf-fp8", {"quantization_config": {"activation_scheme": "dynamic"}}),
    ):
        target = describe(tmp_path / layout, TINY, layout)  # type: ignore[arg-type]
        for scheme, expected in (({}, True), (keys, False)):
            edit_json(next(target.glob("[pc]*.json")), scheme)
            weight = open_dummy(target).load(torch.float32, "cpu")["layers.0.attention.wo.weight"]
            assert isinstance(weight, Fp8Weight)
            assert (weight.input_scale is not None) == expected


@pytest.mark.parametrize("layout", ["native-fp8", "native-nvfp4", "native-bf16", "hf-fp8"])
def test_the_published_size_to_the_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: Layout
) -> None:
    """All buffers of the full-size pair, asked for on the meta device, against the published totals."""
    monkeypatch.setattr(dummy, "_generator", lambda device, seed, name: None)  # meta has none
    target = describe(tmp_path / "target", SMALL_4, layout, SMALL_4_VISION)
    head = describe(tmp_path / "head", head_config(SMALL_4), "native-fp8")
    seen: list[tuple[int, int]] = []
    filled = tensors(open_dummy(target).load(torch.bfloat16, "meta", lambda *now: seen.append(now)))
    elements: dict[torch.dtype, int] = {}
    for tensor in filled.values():
        assert tensor.is_meta
        elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    matrices = 36 * (5 + 3 + 3 * 128)
    if layout == "native-nvfp4":
        assert elements == {
            torch.uint8: NVFP4_ELEMENTS // 2,
            torch.float8_e4m3fn: NVFP4_ELEMENTS // 16,
            torch.bfloat16: BF16_ELEMENTS + FP8_ELEMENTS - NVFP4_ELEMENTS,
            torch.float32: 36 * 3 * 129,
        }
    elif layout == "native-bf16":
        assert elements == {torch.bfloat16: FP8_ELEMENTS + BF16_ELEMENTS}
    else:
        assert elements == {
            torch.float8_e4m3fn: FP8_ELEMENTS,
            torch.bfloat16: BF16_ELEMENTS,
            torch.float32: 2 * matrices,
        }
    done, total = seen[-1]
    assert done == total == sum(t.nbytes for t in filled.values() if t.dtype != torch.float32)

    opened = open_head(str(head), dummy=True)
    assert isinstance(opened, MistralHead)
    parts = tensors(opened.load(torch.bfloat16, "meta"))
    assert len(parts) == 60
    assert sum(t.numel() for t in parts.values() if t.dtype == torch.float8_e4m3fn) == 391_643_136
    assert sum(t.nbytes for t in parts.values() if t.dtype == torch.bfloat16) == 46_080


# --- with what


@pytest.mark.parametrize("layout", ["native-fp8", "native-nvfp4", "native-bf16"])
def test_numbers_have_unit_gain(tmp_path: Path, layout: Layout) -> None:
    target, _ = dummy_pair(tmp_path, layout)
    weights = open_dummy(target).load(torch.bfloat16, "cpu")
    kinds = set()
    for name, weight in weights.items():
        numbers = wide(weight)
        assert bool(torch.isfinite(numbers).all()), name
        if numbers.dim() == 1:
            assert bool((numbers == 1).all()), name
            continue
        gain = 1.0 if name == "tok_embeddings.weight" else numbers.shape[-1] ** -0.5
        assert float(numbers.square().mean().sqrt()) == pytest.approx(gain, rel=0.06), name
        assert abs(float(numbers.mean())) < 0.1 * gain, name
        kinds.add(type(weight))
        if isinstance(weight, Fp8Weight):
            codes = set(weight.codes.view(torch.uint8).flatten().tolist())
            assert codes <= {code for code in range(256) if not code & 0x40}
            assert len(codes) > 120
            assert weight.input_scale is not None
            assert bool((weight.input_scale > 0).all())
        elif isinstance(weight, Nvfp4Weight):
            assert len(set(weight.codes.flatten().tolist())) > 250  # all 256 in a matrix that is not tiny
            scales = weight.block_scales.float()
            assert (float(scales.min()), float(scales.max())) == (1.0, 1.875)
    assert (Fp8Weight in kinds, Nvfp4Weight in kinds) == (layout == "native-fp8", layout == "native-nvfp4")


def test_a_seed_is_a_model(tmp_path: Path) -> None:
    opened = open_dummy(dummy_pair(tmp_path, "native-fp8")[0])
    assert isinstance(opened, DummyMistral)

    def numbers(seed: int) -> dict[str, Tensor]:
        return tensors(dummy.fill(opened.plan.weights, torch.float32, "cpu", seed))

    first, again, other = numbers(3), numbers(3), numbers(4)
    assert all(same_bits(tensor, again[name]) for name, tensor in first.items())
    matrices = [name for name in first if first[name].dim() > 1]
    assert not any(same_bits(first[name], other[name]) for name in matrices)
    shapes = {(first[name].shape, first[name].dtype) for name in matrices}
    assert len(shapes) < len(matrices)  # some are alike, and yet
    assert len({first[name].view(torch.uint8).numpy().tobytes() for name in matrices}) == len(matrices)
    by_loading = tensors(opened.load(torch.float32, "cpu"))
    assert all(same_bits(tensor, by_loading[name]) for name, tensor in numbers(dummy.TARGET_SEED).items())


def test_a_head_is_no_copy_of_its_target(tmp_path: Path) -> None:
    target, head = dummy_pair(tmp_path, "native-fp8")
    opened = open_head(str(head), dummy=True)
    assert isinstance(opened, MistralHead)
    of_head = tensors(opened.load(torch.float32, "cpu"))
    of_target = tensors(open_dummy(target).load(torch.float32, "cpu"))
    codes = "layers.0.attention.wo.weight codes"
    assert of_head[codes].shape == of_target[codes].shape
    assert not same_bits(of_head[codes], of_target[codes])


def test_a_gguf_file_says_what_shape_it_is_and_no_more(tmp_path: Path) -> None:
    config, weights = tiny_llama(vocab_size=300)
    file = write_gguf(tmp_path / "m.gguf", config, weights)
    opened = open_dummy(file)
    real = open_model(file)
    assert (opened.name, opened.config) == (real.name, real.config)
    assert opened.tokenizer().vocab_size == 300
    loaded, filled = real.load(torch.float32, "cpu"), opened.load(torch.float32, "cpu")
    assert loaded.keys() == filled.keys()
    assert not same_bits(tensors(loaded)["lm_head.weight"], tensors(filled)["lm_head.weight"])


# --- which files


def test_weight_files_are_not_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    target, head = dummy_pair(tmp_path, "native-fp8")
    for directory in (target, head):
        (directory / "consolidated.safetensors").write_bytes(b"garbage")
        (directory / "consolidated.safetensors.index.json").write_text("garbage")
    with pytest.raises(CheckpointError, match="cannot be read as JSON"):
        build(str(target), str(head), settings(dummy_weights=False))
    served = build(str(target), str(head), settings())
    assert (served.name, served.root, served.draft_name) == ("target", str(target), "eagle (head)")
    said = [record.getMessage() for record in caplog.records]
    for directory in (target, head):
        assert f"{directory}: random weights in place of the files' (--load-format dummy)" in said


def test_the_hub_is_asked_for_small_files_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    target, head = dummy_pair(tmp_path, "native-fp8")
    asked: list[str] = []

    def snapshot(repo: str, *, allow_patterns: list[str]) -> str:
        asked.extend(allow_patterns)
        return str({"org/target": target, "org/head": head}[repo])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.chdir(tmp_path / "target")
    assert open_dummy("org/target").config == CONFIG
    assert open_head("org/head", dummy=True).config == head_config(CONFIG)
    assert "params.json" in asked
    assert not any("*" in pattern for pattern in asked)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    target, head = dummy_pair(tmp_path, "native-fp8")
    (target / "tekken.json").unlink()
    with pytest.raises(CheckpointError, match=r"target: no tekken.json, found no tokenizer file"):
        build(str(target), str(head), settings())
    write_hf(tmp_path / "llama", *tiny_llama(vocab_size=300))
    with pytest.raises(CheckpointError, match=r"llama: no tokenizer.json"):
        build(str(tmp_path / "llama"), "none", settings())
    (target / "params.json").rename(target / "other.json")
    with pytest.raises(CheckpointError, match=r"found other.json, expected a params.json or config.json"):
        open_dummy(target)
    (head / "params.json").unlink()
    with pytest.raises(CheckpointError, match=r"head: the directory has no config.json"):
        build(str(tmp_path / "llama"), str(head), settings())


def test_configurations_that_make_no_model_are_refused(tmp_path: Path) -> None:
    target, _ = dummy_pair(tmp_path, "native-nvfp4")
    params = target / "params.json"
    edit_json(params, {"quantization": {"qformat_weight": "fp8_e4m3"}})
    with pytest.raises(ConfigError, match="only one of quantization and quantization_config"):
        open_dummy(target)
    edit_json(params, {"quantization": None, "dim": 72})
    with pytest.raises(CheckpointError, match="matrix layers.0.experts.w1 has 72 columns"):
        open_dummy(target)
    edit_json(params, {"dim": 64, "quantization_config": {"format": "int-quantized"}})
    with pytest.raises(ConfigError, match="nvfp4-pack-quantized"):
        open_dummy(target)
    edit_json(params, {"quantization_config": None})
    opened = open_dummy(target)
    with pytest.raises(CheckpointError, match=r"cannot be loaded as torch.int8"):
        opened.load(torch.int8, "cpu")


def test_a_plan_without_files_reads_nothing(tmp_path: Path) -> None:
    opened = open_dummy(dummy_pair(tmp_path, "native-fp8")[0])
    assert isinstance(opened, DummyMistral)
    assert opened.plan.num_bytes == 0
    assert all(isinstance(planned, Planned) for planned in opened.plan.weights.values())
    assert not opened.stored


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("layout", ["native-fp8", "native-nvfp4"])
def test_a_gpu_is_filled_where_it_is(tmp_path: Path, layout: Layout) -> None:
    opened = open_dummy(dummy_pair(tmp_path, layout)[0])
    here = tensors(opened.load(torch.bfloat16, "cpu"))
    there, again = (tensors(opened.load(torch.bfloat16, "cuda")) for _ in range(2))
    for name, tensor in there.items():
        assert tensor.is_cuda
        assert same_bits(tensor.cpu(), again[name].cpu())
        assert (tensor.dtype, tensor.shape) == (here[name].dtype, here[name].shape)
        if name.endswith((" scale", " divisor")):
            assert torch.equal(tensor.cpu(), here[name])
        elif tensor.dim() > 1 and tensor.dtype == torch.bfloat16:
            assert float(tensor.float().std()) == pytest.approx(float(here[name].float().std()), rel=0.1)
