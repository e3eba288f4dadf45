"""The tables of the published layouts against the published counts; and files that hold what they list."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from engine.checkpoint import open_model
from engine.checkpoint.mistral_hf import MistralHfCheckpoint
from engine.checkpoint.mistral_tables import VisionShape, expected_weights
from engine.checkpoint.native import NativeCheckpoint, read_mistral_head
from engine.checkpoint.synthetic import write_head, write_headers, write_target
from engine.checkpoint.synthetic_config import SMALL_4, SMALL_4_VISION, TINY, TINY_VISION, head_config
from engine.checkpoint.synthetic_tables import (
    HEAD_LAYOUTS,
    LAYOUTS,
    Layout,
    Table,
    TensorSpec,
    head_table,
    target_table,
)
from engine.errors import ConfigError
from engine.nn.weight import Fp8Weight, Nvfp4Weight
from tests.checkpoint.mistral_files import read_all, same_bits, wide

LAYERS, EXPERTS = 36, 128
VISION_ELEMENTS = 428_472_320


def num_elements(table: Table, dtype: str, least_dims: int = 0) -> int:
    """least_dims 1 leaves out what hubs do not count: scales without a dimension."""
    return sum(
        spec.num_elements for spec in table.values() if spec.dtype == dtype and len(spec.shape) >= least_dims
    )


def num_bytes(table: Table) -> int:
    return sum(spec.num_bytes for spec in table.values())


# --- the published model, tables only ---


def test_native_fp8_has_the_published_counts() -> None:
    table = target_table(SMALL_4, "native-fp8", SMALL_4_VISION)
    assert len(table) == 42_741 == LAYERS * 1_181 + 3 + 222
    assert num_elements(table, "F8_E4M3") == 117_879_865_344
    scales = sum(name.endswith(("qscale_weight", "qscale_act")) for name in table)
    assert num_elements(table, "BF16") - scales == 1_521_433_600
    # 120,927,211,096 bytes are published, headers included: what is left must be headers, ~100 B a tensor.
    assert 90 < (120_927_211_096 - num_bytes(table)) / len(table) < 115


def test_hf_fp8_has_the_published_counts() -> None:
    table = target_table(SMALL_4, "hf-fp8", SMALL_4_VISION)
    assert len(table) == 1_485 == LAYERS * 35 + 3 + 222
    assert num_elements(table, "F8_E4M3") == 117_879_865_344
    assert num_elements(table, "BF16", least_dims=1) == 1_521_452_032
    assert sum(spec.shape == () for spec in table.values()) == LAYERS * 16
    assert 120 < (120_922_973_936 - num_bytes(table)) / len(table) < 150


def test_nvfp4_has_the_published_counts_and_bytes() -> None:
    table = target_table(SMALL_4, "native-nvfp4", SMALL_4_VISION)
    assert len(table) == 56_313
    assert Counter(".".join(name.split(".")[:2]) for name in table)["layers.7"] == 1_558
    assert num_bytes(table) == 70_801_959_560  # exactly: what is published is the data without headers
    assert sum(name.endswith("weight_packed") for name in table) == LAYERS * (EXPERTS + 1) * 3
    assert table["layers.0.experts.5.w1.input_global_scale"] == TensorSpec("F32", (1,))
    assert table["layers.0.shared_experts.w1.input_global_scale"] == TensorSpec("BF16", (1,))


@pytest.mark.parametrize("layout", ["native-bf16", "hf-bf16"])
def test_bfloat16_has_every_parameter_once(layout: Layout) -> None:
    table = target_table(SMALL_4, layout, SMALL_4_VISION)
    assert num_elements(table, "BF16") == 117_879_865_344 + 1_521_433_600
    assert num_bytes(table) == 2 * num_elements(table, "BF16")


def test_the_vision_encoder_has_the_published_counts() -> None:
    shapes = SMALL_4_VISION.native_tensors()
    assert len(shapes) == 222
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == VISION_ELEMENTS
    assert shapes["patch_merger.merging_layer.weight"] == (1024, 4096)
    assert shapes["vision_language_adapter.w_in.weight"] == (4096, 1024)
    renamed = SMALL_4_VISION.hf_tensors()
    assert list(renamed.values()) == list(shapes.values())
    assert renamed["vision_tower.transformer.layers.23.feed_forward.down_proj.weight"] == (1024, 4096)
    assert renamed["vision_tower.patch_conv.weight"] == (1024, 3, 14, 14)
    for name in ("norm", "patch_merger.merging_layer", "linear_1", "linear_2"):
        assert f"multi_modal_projector.{name}.weight" in renamed


def test_the_head_has_the_published_counts() -> None:
    table = head_table(head_config(SMALL_4))
    assert len(table) == 60
    assert num_elements(table, "F8_E4M3") == 391_643_136
    assert num_elements(table, "BF16", least_dims=1) * 2 == 46_080
    assert table["eagle_linear.weight"].shape == (4096, 8192)
    assert table["layers.1.feed_forward.w2.weight"].shape == (4096, 12288)


@pytest.mark.parametrize(
    ("layout", "num_shards"), [("native-fp8", 7), ("native-nvfp4", 13), ("hf-fp8", 3), ("hf-bf16", 5)]
)
def test_readers_understand_the_published_headers(tmp_path: Path, layout: Layout, num_shards: int) -> None:
    directory = write_headers(tmp_path, SMALL_4, layout, vision=SMALL_4_VISION, num_shards=num_shards)
    assert sum(file.stat().st_blocks * 512 for file in tmp_path.iterdir()) < 1 << 25  # holes, not data
    checkpoint = open_model(directory)
    assert checkpoint.config == SMALL_4
    table = target_table(SMALL_4, layout, SMALL_4_VISION)
    assert isinstance(checkpoint, NativeCheckpoint | MistralHfCheckpoint)
    assert {name: TensorSpec(entry.dtype, entry.shape) for name, entry in checkpoint.stored.items()} == table


def test_the_head_reader_understands_the_published_header(tmp_path: Path) -> None:
    config = head_config(SMALL_4)
    head = read_mistral_head(write_headers(tmp_path, config, "native-fp8"))
    assert head.config == config
    assert len(head.stored) == 60
    assert {name: planned.expected.shape for name, planned in head.plan.weights.items()} == {
        name: weight.shape for name, weight in expected_weights(config).items()
    }


# --- tiny ones, written ---


@pytest.mark.parametrize("vision", [None, TINY_VISION])
@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_written_targets_come_back(
    tmp_path: Path, layout: Layout, num_shards: int, vision: VisionShape | None
) -> None:
    write_target(tmp_path / "tiny", TINY, layout, vision=vision, num_shards=num_shards)
    assert len(list((tmp_path / "tiny").glob("*.safetensors"))) == num_shards
    checkpoint = open_model(tmp_path / "tiny")
    assert (checkpoint.config, checkpoint.name) == (TINY, "tiny")
    loaded = checkpoint.load(torch.bfloat16, "cpu")
    assert {name: tuple(weight.shape) for name, weight in loaded.items()} == {
        name: expected.stacked for name, expected in expected_weights(TINY).items()
    }
    assert isinstance(loaded["layers.0.gate.weight"], torch.Tensor)
    kind = {"fp8": Fp8Weight, "nvfp4": Nvfp4Weight, "bf16": torch.Tensor}[layout.partition("-")[2]]
    assert isinstance(loaded["layers.1.experts.w2"], kind)
    assert isinstance(loaded["layers.1.shared_experts.w2.weight"], kind)
    assert isinstance(loaded["layers.0.attention.wo.weight"], Fp8Weight) == layout.endswith("fp8")


def test_one_seed_is_one_model(tmp_path: Path) -> None:
    loaded = {
        layout: open_model(write_target(tmp_path / layout, TINY, layout, seed=3)).load(torch.float32, "cpu")
        for layout in LAYOUTS
    }
    # relative error of a matrix: 8 bits round by up to 1/16, 4 bits by more
    limits: dict[Layout, float] = {"native-fp8": 0.04, "native-nvfp4": 0.15, "hf-fp8": 0.04, "hf-bf16": 0.0}
    for layout, most in limits.items():
        for name, exact in loaded["native-bf16"].items():
            error = wide(loaded[layout][name]) - wide(exact)
            assert error.norm() <= most * wide(exact).norm(), (layout, name)
    other = open_model(write_target(tmp_path / "other", TINY, "native-bf16", seed=4)).load(
        torch.float32, "cpu"
    )
    assert not torch.allclose(wide(other["output.weight"]), wide(loaded["native-bf16"]["output.weight"]))


def test_matrices_have_unit_gain_and_experts_differ(tmp_path: Path) -> None:
    loaded = open_model(write_target(tmp_path, TINY, "native-bf16")).load(torch.float32, "cpu")
    experts = wide(loaded["layers.0.experts.w1"])
    assert 0.9 < float(experts.std()) * TINY.hidden_size**0.5 < 1.1
    assert len({float(expert.sum()) for expert in experts}) == TINY.num_experts


@pytest.mark.parametrize("layout", HEAD_LAYOUTS)
def test_written_heads_come_back(tmp_path: Path, layout: Layout) -> None:
    config = head_config(TINY)
    head = read_mistral_head(write_head(tmp_path, config, layout))
    assert head.config == config
    loaded = head.load(torch.bfloat16, "cpu")
    assert list(loaded) == list(expected_weights(config))
    stored = read_all(tmp_path)["layers.1.feed_forward.w3.weight"]
    weight = loaded["layers.1.feed_forward.w3.weight"]
    assert same_bits(weight.codes if isinstance(weight, Fp8Weight) else wide(weight).bfloat16(), stored)


def test_layouts_that_do_not_exist_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="layout of a head is 'hf-fp8', expected native-fp8 or native-bf16"):
        write_head(tmp_path, head_config(TINY), "hf-fp8")
    odd = dataclasses.replace(TINY, moe_intermediate_size=40)
    with pytest.raises(ConfigError, match="moe_intermediate_size 40, expected multiples of 16 for NVFP4"):
        write_target(tmp_path, odd, "native-nvfp4")
