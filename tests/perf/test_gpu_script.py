"""perf/gpu.sh with a stand-in for python that notes what it is asked to run."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from engine.cli import bench, bench_steps
from engine.cli.parser import Parser
from engine.config import EngineConfig

SCRIPT = Path(__file__).parents[2] / "perf" / "gpu.sh"

# What the script asks python itself for: the GPU's memory, the default model's file, and flashinfer.
STAND_IN = """#!/bin/sh
case "$*" in
  *mem_get_info*) echo "$GIGABYTES" ;;
  *default_model_path*) [ -n "$PACKAGE" ] && echo "$PACKAGE" ;;
  *flashinfer*) exit 1 ;;
  *) echo "$*" >> "$CALLS"; case "$*" in *"$FAILS"*) exit 3 ;; esac ;;
esac
"""


class Runs:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.python = root / "python"
        self.python.write_text(STAND_IN)
        self.python.chmod(0o755)

    def __call__(
        self, *words: str, gigabytes: int = 0, package: str = "", fails: str = "nothing", **variables: str
    ) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        """How a run of the script ended, and the commands it ran."""
        calls = self.root / "calls"
        calls.write_text("")
        environment = {
            "PATH": os.environ["PATH"], "PYTHON": str(self.python), "OUT": str(self.root / "out"),
            "CALLS": str(calls), "GIGABYTES": str(gigabytes), "PACKAGE": package, "FAILS": fails, **variables,
        }  # fmt: skip
        done = subprocess.run(
            ["bash", str(SCRIPT), *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done, calls.read_text().splitlines()


@pytest.fixture
def gpu_script(tmp_path: Path) -> Runs:
    return Runs(tmp_path)


def steps_of(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Exit codes by step, from the last line."""
    last = json.loads(done.stdout.splitlines()[-1])
    return {step["name"]: step["rc"] for step in last["steps"]}


@pytest.mark.parametrize(
    ("gigabytes", "names"), [(151, ["fp8", "nvfp4", "fp8-eager"]), (85, ["nvfp4", "nvfp4-eager"])]
)
def test_the_model_is_stored_as_the_memory_allows(gpu_script: Runs, gigabytes: int, names: list[str]) -> None:
    done, calls = gpu_script("model", gigabytes=gigabytes)
    assert done.returncode == 0
    assert steps_of(done) == {f"model-{name}": 0 for name in names}
    for name, call in zip(names, calls, strict=True):
        kind, _, eager = name.partition("-")
        assert f"--quantization {kind} " in call
        assert ("--enforce-eager" in call) == bool(eager)
    assert all("--load-format dummy --model mistral-small-4 --device cuda" in call for call in calls)


def test_all_parts_one_after_another_and_the_worst_counts(gpu_script: Runs) -> None:
    done, calls = gpu_script(gigabytes=85, fails="perf.kernels", package="/x.gguf")
    assert [name for name, rc in steps_of(done).items() if rc] == ["kernels"]
    assert done.returncode == 1
    assert list(steps_of(done)) == [
        "kernel-tests",
        "kernels",
        "model-nvfp4",
        "model-nvfp4-eager",
        "engine-tests",
        "pair-equality",
        "pair-speed",
    ]
    assert len(calls) == 7
    assert json.loads((gpu_script.root / "out" / "gpu.json").read_text())["dry_run"] is False
    assert "=== kernels: " in (gpu_script.root / "out" / "gpu.log").read_text()


@pytest.mark.parametrize(
    ("words", "variables", "file"),
    [
        (["pair", "--model", "/a.gguf"], {"PAIR_MODEL": "/b.gguf"}, "/a.gguf"),
        (["pair"], {"PAIR_MODEL": "/b.gguf"}, "/b.gguf"),
        (["pair"], {"PACKAGE": "/c.gguf"}, "/c.gguf"),
    ],
)
def test_the_pairs_model(gpu_script: Runs, words: list[str], variables: dict[str, str], file: str) -> None:
    done, calls = gpu_script(*words, **variables)  # type: ignore[arg-type]
    assert done.returncode == 0
    tests, equality, speed = calls
    assert tests.startswith("-m pytest ")
    assert "-m gpu" in tests
    assert tests.endswith("tests/engine/test_cuda.py")
    assert all(f"--model {file} --spec-model draft/heads/" in call for call in (equality, speed))
    assert "perf.device_equality" in equality
    assert "--dtype bfloat16" in speed
    assert "--peer transformers" in speed


def test_without_the_pairs_model_its_programs_say_so(gpu_script: Runs) -> None:
    done, calls = gpu_script("pair", fails="perf.device_equality")
    assert steps_of(done) == {"engine-tests": 0, "pair-equality": 3, "pair-speed": 0}
    assert not any("--model" in call for call in calls)


def test_a_dry_run_is_tiny(gpu_script: Runs) -> None:
    done, calls = gpu_script("--dry-run", package="/c.gguf")
    assert done.returncode == 0
    assert list(steps_of(done)) == [
        "kernel-tests", "kernels", "model-fp8", "model-nvfp4", "model-fp8-eager", "engine-tests",
        "pair-equality", "pair-speed",
    ]  # fmt: skip
    assert "-m not gpu" in calls[0]
    assert "--dry-run" in calls[1]
    assert all("mistral-small-4-tiny --device cpu" in call for call in calls[2:5])
    assert "-m not gpu" in calls[5]
    assert all("--device cpu" in call for call in calls[6:])


@pytest.mark.parametrize("words", [["kernel"], ["model", "--fast"], ["pair", "--model"]])
def test_nonsense_is_refused(gpu_script: Runs, words: list[str]) -> None:
    done, calls = gpu_script(*words)
    assert done.returncode != 0
    assert "--model" in done.stderr
    assert calls == []


@pytest.mark.parametrize("words", [[], ["--dry-run"]])
def test_the_bench_understands_what_it_is_asked(gpu_script: Runs, words: list[str]) -> None:
    _, calls = gpu_script(*words, gigabytes=151, package="/c.gguf")
    asked = [call.partition("engine.cli.main bench ")[2] for call in calls if "bench latency" in call]
    assert len(asked) == 4
    for line in asked:
        parser = Parser(prog="haast bench")
        bench.add_arguments(parser)
        args = parser.parse_args(line.split())
        if args.load_format == "dummy":
            wanted = bench_steps.wanted_of(args)
            checkpoint, _ = bench_steps.open_pair(args)
            config = bench_steps.config_for(EngineConfig(), wanted, checkpoint)
            assert config.max_num_batched_tokens >= max(wanted.nodes) * min(wanted.batches)
