"""Where values of flags come from, how flags may be spelled, and what the parser says about them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.cli import chat, generate, main, options, serve, train
from engine.cli.environment import unknown_variables, variable_of, with_hyphens, with_words
from engine.cli.parser import FOREIGN_GROUP
from engine.cli.speculative import asked
from tests.server.test_launch_line import parse, refusal

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a config file and returns its path."""

    def write(text: str) -> str:
        file = tmp_path / "haast.yaml"
        file.write_text(text)
        return str(file)

    return write


def given(args: argparse.Namespace) -> dict[str, tuple[str, str]]:
    return {given.flag: (given.value, given.source) for given in args.given}


# --- spelling


def test_underscores_in_flags_and_not_in_values() -> None:
    args = parse("a_b", "--max_model_len=64", "--served_model_name", "x_y", "z_w", "--host=--max_num_seqs")
    assert (args.model, args.max_model_len, args.host) == ("a_b", 64, "--max_num_seqs")
    assert args.served_model_name == ["x_y", "z_w"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--max_model_len", "8"], ["--max-model-len", "8"]),
        (["--max_model-len=a_b=c_d"], ["--max-model-len=a_b=c_d"]),
        (["--other_flag", "8"], ["--other_flag", "8"]),  # unknown: the error shows what was typed
        (["--max_model_len is a_b"], ["--max_model_len is a_b"]),
        (["-max_model_len", "max_model_len"], ["-max_model_len", "max_model_len"]),
        (["--", "--max_model_len"], ["--", "--max_model_len"]),
    ],
)
def test_with_hyphens(words: list[str], expected: list[str]) -> None:
    assert with_hyphens(words, {"--max-model-len": argparse.Action([], "x")}) == expected


def test_a_value_that_looks_like_a_flag_stays_as_it_is() -> None:
    parser = main.Parser()
    chat.add_arguments(parser)
    args = parser.parse_args(
        ["--system", "--max_tokens is a flag", "--question=--max_tokens", "--max_tokens", "3"]
    )
    assert (args.system, args.question, args.max_tokens) == ("--max_tokens is a flag", "--max_tokens", 3)


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("--max_model_length", "did you mean --max-model-len?"),
        ("--spec-model-path=x", "did you mean --spec-model?"),
        ("--reasoning-parsers", "did you mean --reasoning-parser?"),
        ("--zzz", "see haast serve --help"),
    ],
)
def test_unknown_flags(word: str, hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, word)
    assert said == f"haast serve: error: unknown flag {word.partition('=')[0]}; {hint}"


def test_no_flag_is_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown flag --max-model; did you mean --max-model-len?" in refusal(capsys, "--max-model", "8")


# --- sources


def test_flag_then_variable_then_file_then_default(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write("max-model-len: 100\nmax_num_seqs: 5\nblock-size: 8\nmodel: from-file\n")
    words = ["--config", file, "--max_model_len", "300"]
    monkeypatch.setenv("HAAST_MAX_MODEL_LEN", "200")
    monkeypatch.setenv("HAAST_MAX_NUM_SEQS", "6")
    monkeypatch.setenv("HAAST_CANARY", "0.001")
    args = parse(*words)
    config = options.engine_config(args)
    assert (config.max_model_len, config.max_num_seqs, config.page_size) == (300, 6, 8)
    assert (config.max_num_batched_tokens, config.canary) == (512, 0.001)
    assert options.model_name(args) == "from-file"
    assert given(args) == {
        "--config": (file, "flag"),
        "--max-model-len": ("300", "flag"),
        "--max-num-seqs": ("6", "HAAST_MAX_NUM_SEQS"),
        "--block-size": ("8", f"{file}: block-size"),
        "--model": ("from-file", f"{file}: model"),
        "--canary": ("0.001", "HAAST_CANARY"),
    }
    assert options.model_name(parse("typed", *words)) == "typed"
    monkeypatch.setenv("HAAST_CONFIG", file)
    monkeypatch.setenv("HAAST_MAX_NUM_SEQS", "")  # as if it were not set
    assert options.engine_config(parse()).max_num_seqs == 5
    # what says the default is not worth a word
    assert "--port" not in given(parse("--port", "8000"))


def test_an_alias_on_the_command_line_wins_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAAST_MAX_MODEL_LEN", "200")
    monkeypatch.setenv("HAAST_SPECULATIVE_CONFIG", '{"num_speculative_tokens": 2}')
    args = parse("--context-length", "300", "-sc", "{}")
    assert args.max_model_len == 300
    assert asked(args).num_tokens is None


def test_every_shape_of_value_in_a_file(write: Write) -> None:
    file = write(
        "api-key: [one, two]\nserved-model-name: [a, b c]\nenforce-eager: true\nenable-lora: false\n"
        "gpu-memory-utilization: 0.5\nkv-cache-memory: 2GiB\nlog-level: 'warning'\nhost: --x\n"
        "speculative-config: {num_speculative_tokens: 5, method: ngram}\nlimit-mm-per-prompt: {image: 0}\n"
    )
    args = parse(f"--config={file}", "model")
    server = serve.server_options(args)
    assert (server.api_keys, server.served_names, server.host) == (("one", "two"), ("a", "b c"), "--x")
    assert (args.gpu_memory_utilization, args.kv_cache_memory) == (0.5, 2 << 30)
    assert (asked(args).head, asked(args).num_tokens) == ("ngram", 5)
    assert [note.partition(":")[0] for note in args.notes] == ['--limit-mm-per-prompt {"image"']
    assert given(args)["--api-key"] == ("***", f"{file}: api-key")
    assert "--enable-lora" not in given(args)


def test_every_shape_of_value_in_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (
        ("API_KEY", "one two"),
        ("SERVED_MODEL_NAME", "a b"),
        ("ENFORCE_EAGER", "Yes"),
        ("TRUST_REMOTE_CODE", "0"),
        ("SPEC_METHOD", "NGRAM"),
    ):
        monkeypatch.setenv(f"HAAST_{name}", value)
    args = parse("model")
    server = serve.server_options(args)
    assert (server.api_keys, server.served_names) == (("one two",), ("a", "b"))
    assert asked(args).head == "ngram"
    assert given(args) == {
        "--api-key": ("***", "HAAST_API_KEY"),
        "--served-model-name": ("a b", "HAAST_SERVED_MODEL_NAME"),
        "--enforce-eager": ("", "HAAST_ENFORCE_EAGER"),
        "--spec-method": ("ngram", "HAAST_SPEC_METHOD"),
    }
    assert serve.server_options(parse("--api-key", "typed")).api_keys == ("typed",)


@pytest.mark.parametrize(
    ("words", "text", "expected"),
    [
        ("", "", True),
        ("--no-enable-prefix-caching", "", False),
        ("--disable-radix-cache", "", False),
        ("--enable_prefix_caching", "", True),
        ("", "enable-prefix-caching: false", False),
        ("", "no-enable-prefix-caching: true", False),
        ("", "no-enable-prefix-caching: false", True),
        ("", "disable-radix-cache: true", False),
        ("", "disable-radix-cache: false", True),
        ("--enable-prefix-caching", "enable-prefix-caching: false", True),
        ("--disable-radix-cache", "enable-prefix-caching: true", False),
    ],
)
def test_a_switch_has_two_positions(words: str, text: str, expected: bool, write: Write) -> None:
    """Whichever of its names is used, and wherever."""
    args = parse(f"--config={write(text)}", "model", *words.split())
    assert options.engine_config(args).prefix_caching is expected
    assert ("--no-enable-prefix-caching" in given(args)) is not expected


def test_a_switch_in_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAAST_ENABLE_PREFIX_CACHING", "0")
    assert not options.engine_config(parse("model")).prefix_caching
    assert options.engine_config(parse("model", "--enable-prefix-caching")).prefix_caching


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("PORT", "x", "argument --port: invalid int value: 'x' (from HAAST_PORT)"),
        ("ENFORCE_EAGER", "maybe", "HAAST_ENFORCE_EAGER is 'maybe', expected true or false"),
        ("LOG_LEVEL", "loud", "(from HAAST_LOG_LEVEL)"),
        ("TENSOR_PARALLEL_SIZE", "2", "(from HAAST_TENSOR_PARALLEL_SIZE)"),
        ("TRUST_REMOTE_CODE", "1", "(from HAAST_TRUST_REMOTE_CODE)"),
        ("CONFIG", "/no/such/file", "--config /no/such/file: cannot be read as YAML"),
    ],
)
def test_bad_variables_are_named(
    name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(f"HAAST_{name}", value)
    assert message in refusal(capsys)


def test_a_misspelt_variable_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By its name alone: its value may be a key."""
    monkeypatch.setenv("HAAST_MAX_MODEL_LENGTH", "8")
    monkeypatch.setenv("HAAST_APIKEY", "hunter2")
    monkeypatch.setenv("HAAST_QQ", "1")
    monkeypatch.setenv("HAAST_PORT", "9")
    monkeypatch.setenv("HAAST_CPU_KERNELS", "0")
    assert unknown_variables(parse().known_variables) == [
        f"the environment variable {said}"
        for said in (
            "HAAST_APIKEY is no flag's here; did you mean HAAST_API_KEY?",
            "HAAST_MAX_MODEL_LENGTH is no flag's here; did you mean HAAST_MAX_MODEL_LEN?",
            "HAAST_QQ is no flag's here",
        )
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max-model-length: 8",
            "max-model-length is not a flag that a file may set; did you mean max-model-len?",
        ),
        ("config: other.yaml", "config is not a flag that a file may set"),
        ("help: true", "help is not a flag that a file may set"),
        ("3: 4", "3 is not a flag that a file may set"),
        ("- a\n- b", "found a list, expected flags and their values"),
        ("a: [", "cannot be read as YAML: while parsing"),
        ("port: 2026-99-99", "cannot be read as YAML"),
        ("port: 2026-01-01", "port is datetime.date(2026, 1, 1), expected a number or a text"),
        ("port: [1, 2]", "port is [1, 2], expected one value"),
        ("port: null", "port is None, expected a number or a text"),
        ("quantization: no", "quantization is False, expected a number or a text; texts may need quotes"),
        ("enforce-eager: 2", "enforce-eager is 2, expected true or false"),
        ("host: {a: b}", "host is {'a': 'b'}, expected a number or a text"),
        ("api-key: []", "api-key is an empty list, expected a value"),
        ("api-key: 0123", "api-key: found a int, expected a text in quotes"),
        ("max-model-len: 3\ncontext_length: 5", "max-model-len and context_length, expected one of them"),
        ("\tport: 3", r"found character '\t' that cannot start any token, line 1, column 1"),
        ("port: 3\nport", "could not find expected ':', line 2, column 5"),
        ("port: eight", "invalid int value: 'eight' (from "),
        ("tensor-parallel-size: 2", "haast runs on one GPU"),
    ],
)
def test_bad_files_are_named(
    text: str, message: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(text)
    said = refusal(capsys, "--config", file)
    assert message in said
    assert file in said


@pytest.mark.parametrize(
    "text",
    [
        "api-key: [hunter2",
        'api-key: "hunter2\nport: 1',
        "api-key: [a, [hunter2]]",
        "api-key: {hunter2: 3}",
        "api-key: *hunter2",
        "api-key: !hunter2 a",
        "api-key: !hunter2!a b",
        "api-key: &hunter2 [&hunter2 a]",
        "api-key: hunter2\n---\nhunter2",
        "api-key: {[hunter2]: 1}",
        "api-key: 0x_\nport: hunter2",
    ],
)
def test_no_mistake_in_a_file_shows_a_key(
    text: str, write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "hunter2" not in refusal(capsys, "--config", write(text))


def test_an_unknown_flags_value_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    said = "haast serve: error: unknown flag --apikey; did you mean --api-key?"
    assert refusal(capsys, "--apikey=hunter2") == said


def test_an_empty_config_on_the_command_line_wins_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAAST_CONFIG", "/no/such/file")
    assert parse("--config=").port == 8000


def test_an_empty_file_says_nothing(write: Write) -> None:
    assert options.engine_config(parse("--config", write("# later\n"))) == options.engine_config(parse())


def test_settings_come_before_a_double_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HAAST_PORT", "9")
    args = parse("--", "model")
    assert (args.model, args.port) == ("model", 9)
    assert with_words(["a", "--", "--b"], []) == ["a", "--", "--b"]


def test_a_verb_under_a_verb_reads_variables_too(monkeypatch: pytest.MonkeyPatch) -> None:
    from engine.cli import bench

    monkeypatch.setenv("HAAST_MAX_TOKENS", "3")
    parser = main.Parser()
    bench.add_arguments(parser)
    args = parser.parse_args(["latency", "--num_prompts", "2"])
    assert (args.max_tokens, args.num_prompts) == (3, 2)
    assert given(args) == {"--max-tokens": ("3", "HAAST_MAX_TOKENS"), "--num-prompts": ("2", "flag")}


# --- help


@pytest.mark.parametrize("flag", ["--help", "-h", "--help=all"])
def test_help_is_given_whatever_else_is_wrong(
    flag: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HAAST_CONFIG", "/no/such/file")
    monkeypatch.setenv("HAAST_ENFORCE_EAGER", "maybe")
    with pytest.raises(SystemExit) as caught:
        main.main(["serve", flag])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith("usage: haast serve [")


def test_all_of_the_help_is_everywhere(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--help=all"]) == 0
    assert capsys.readouterr().out.startswith("usage: haast VERB")
    for words in (["bench"], ["bench", "latency"]):
        with pytest.raises(SystemExit) as caught:
            main.main([*words, "--help=all"])
        assert caught.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: haast {' '.join(words)} [")


def test_help_fits_on_a_screen(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.main(["serve", "--help"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 52
    assert max(map(len, lines)) <= 110
    shown = [line.split()[0] for line in lines if line.startswith("  --")]
    assert {"--port", "--max-model-len", "--speculative-config", "--config"} <= set(shown)
    assert "--tensor-parallel-size" not in shown
    for group in ("model:", "engine:", "speculation:", "server:"):
        assert group in lines
    assert "  --port PORT                    0 picks a free one (8000)" in lines


def test_all_of_the_help_names_everything(capsys: pytest.CaptureFixture[str]) -> None:
    parser = main.Parser()
    serve.add_arguments(parser)
    with pytest.raises(SystemExit) as caught:
        main.main(["serve", "--help=all"])
    assert caught.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split()
    shown = [action for action in parser._actions if action.help != argparse.SUPPRESS]
    assert len(shown) > 60
    for action in shown:
        variable = variable_of(action)
        assert all(option in words for option in action.option_strings), action.option_strings
        assert variable is None or f"[{variable}]" in words
    assert FOREIGN_GROUP.split()[-1] + ":" in words


@pytest.mark.parametrize("verb", [chat, generate, train, serve])
def test_no_two_flags_share_a_variable(verb: object, capsys: pytest.CaptureFixture[str]) -> None:
    parser = main.Parser()
    verb.add_arguments(parser)  # type: ignore[attr-defined]
    variables = [variable for action in parser._actions if (variable := variable_of(action)) is not None]
    assert len(variables) == len(set(variables))
    for words in (["--help"], ["--help=all"]):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert capsys.readouterr().out.startswith("usage: ")
