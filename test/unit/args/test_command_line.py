"""The command line and the file of ``--config``: what they name is served, and a mistake in them is one sentence."""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import subprocess

import pytest
from harness import REPO
from sglang.srt.utils.server_args_config_parser import ConfigArgumentMerger
from sglang_shift.args.config_file import arguments
from sglang_shift.args.server_args import ShiftServerArgs, prepare_server_args
from sglang_shift.errors import ShiftError
from sglang_shift.models.demo import demo_model_path
from sglang_shift.serve_backend import has_shift_flag

ROOT = REPO
FILE = "model-path: there\ntp-size: 4\nsp-size: 2\napi-key: secret\n"


@pytest.fixture
def config(tmp_path):
    def write(text: str | bytes, name: str = "config.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


# Which model


@pytest.mark.parametrize(
    "argv",
    [["--model-path", "there"], ["--model=there"], ["--model-pa", "there"], ["--model-pat=there"]],
)
def test_a_named_model_is_served_however_the_flag_is_spelt(argv):
    assert prepare_server_args(["--tp-size", "2", *argv]).model_path == "there"
    assert prepare_server_args([*argv, "--tp-size", "2"]).model_path == "there"


def test_no_named_model_is_the_demo_model_and_the_log_says_so(config, capfd):
    for argv in (["--tp-size", "2"], ["--config", config("tp_size: 2\n")], ["--config", config("")]):
        assert prepare_server_args(argv).model_path == demo_model_path()
        logging.getLogger().handlers[0].flush()
        assert "No model is named, so the demo model is served." in capfd.readouterr().err
    prepare_server_args(["--model", "there"])
    assert "demo model" not in capfd.readouterr().err


def test_a_named_model_needs_no_demo_model(monkeypatch):
    def missing():
        raise ShiftError("the demo model is missing")

    monkeypatch.setattr("sglang_shift.args.server_args.demo_model_path", missing)
    assert prepare_server_args(["--model-path", "there"]).model_path == "there"
    with pytest.raises(ShiftError, match="is missing"):
        prepare_server_args(["--tp-size", "2"])


@pytest.mark.parametrize("argv", [["there"], ["--tp-size", "2", "there"], ["there", "--tp-size", "2"]])
def test_a_stray_word_is_refused(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        prepare_server_args(argv)
    assert stop.value.code == 2 and "unrecognized arguments: there" in capsys.readouterr().err


def test_an_empty_model_path_is_not_the_demo_model():
    from sglang_shift.launch_server import resolve

    args = prepare_server_args(["--model-path", "", "--tp-size", "2"])
    assert args.model_path == ""
    with pytest.raises(ShiftError, match="--model-path is empty"):
        resolve(args)


# The file


@pytest.mark.parametrize("flag", ["--config {}", "--config={}", "--conf {}", "--confi={}"])
def test_the_file_counts_however_its_flag_is_spelt(config, flag):
    for argv in (flag.format(config(FILE)).split(), ["--port", "5", *flag.format(config(FILE)).split()]):
        args = prepare_server_args(argv)
        assert (args.model_path, args.tp_size, args.sp_size, args.api_key) == ("there", 4, 2, "secret")


def test_names_with_underscores_and_aliases(config):
    path = config("model: there\ntensor_parallel_size: 4\nsequence-parallel-size: auto\nenable_shift_parallel: true\n"
                  "shift_policy: queue-depth\nshift_enter_tokens: 4096\nskip_tokenizer_init: false\n")  # fmt: skip
    args = prepare_server_args(["--config", path])
    assert (args.model_path, args.tp_size, args.sp_size, args.enable_shift_parallel) == ("there", 4, "auto", True)
    assert (args.shift_policy, args.shift_enter_tokens, args.skip_tokenizer_init) == ("queue-depth", 4096, False)


def test_every_flag_that_takes_a_value_can_be_in_a_file(config):
    """By each of its names, with dashes and with underscores; what SGLang does not take from a file, we refuse."""
    parser = argparse.ArgumentParser()
    ShiftServerArgs.add_cli_args(parser)
    refused = ConfigArgumentMerger(parser).unsupported_actions
    owner = {option[2:].replace("-", "_"): action for action in parser._actions for option in action.option_strings}
    for action in parser._actions:
        options = [option for option in action.option_strings if option.startswith("--")]
        switch = isinstance(action, argparse._StoreTrueAction)
        value = "true" if switch else min(map(str, action.choices or ["1"]))
        keys = {name for option in options for name in (option[2:], option[2:].replace("-", "_"))}
        for key in keys | ({action.dest} if owner.get(action.dest, action) is action else set()):
            path = config(f"{key}: {value}\n")
            if key in ("help", "config") or key.replace("-", "_") in refused:
                with pytest.raises(ShiftError, match=f"{key} cannot be given in a file"):
                    arguments(path, parser)
            elif action.type in (str, int, float, None) or action.dest == "sp_size":  # the others want a JSON, say
                meant = parser.parse_args(["--model-path=x", options[0], *([] if switch else [value])])
                assert parser.parse_args(["--model-path=x", *arguments(path, parser)]) == meant, key


@pytest.mark.parametrize(
    "line",
    [
        "tp-size: 4", "skip-tokenizer-init: true", "skip-tokenizer-init: false", "served-model-name: a b",
        "mem-fraction-static: 0.5", "cuda-graph-bs-decode: [1, 2, 4]", "cuda-graph-bs-decode: []",
        'json-model-override-args: {"a": {"b": [1, null, true]}}', "served-model-name: 7", "served-model-name: true",
        "random-seed: 0x10", "disaggregation-mode: 'null'", "chunked-prefill-size: 8192", "max-total-tokens: 1_000",
        "schedule-conservativeness: 1",
    ],
)  # fmt: skip
def test_a_file_means_what_it_means_to_sglang(config, line):
    path = config(f"{line}\nmodel-path: there\n")
    parser = argparse.ArgumentParser()
    ShiftServerArgs.add_cli_args(parser)
    stock = parser.parse_args(ConfigArgumentMerger(parser).merge_config_with_args(["--config", path]))
    ours = prepare_server_args(["--config", path])
    different = {k: v for k, v in vars(stock).items() if k != "config" and getattr(ours, k, v) != v}
    assert different == {}


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("0123", "0123"), ("1_000", "1_000"), ("12:30", "12:30"), ("1.10", "1.10"), ("on", "on"),
        ("-secret", "-secret"),
        ('"--help"', "--help"), ("2024-05-10", "2024-05-10"), ("'0123'", "0123"), ("a=b c", "a=b c"), ('""', ""),
    ],
)  # fmt: skip
def test_a_text_is_taken_as_it_is_written(config, text, key):
    """An --api-key of digits is not a number, and no value is taken for a flag."""
    assert prepare_server_args(["--config", config(f"api-key: {text}\nmodel-path: there\n")]).api_key == key


def test_the_command_line_wins(config):
    path = config(FILE + "cuda-graph-bs-decode: [1, 2]\n")
    flags = ["--model-pa", "here", "--tp", "2", "--cuda-graph-bs-decode", "8"]
    for argv in ([*flags, "--config", path], [f"--config={path}", *flags]):
        args = prepare_server_args(argv)
        assert (args.model_path, args.tp_size, args.sp_size, args.api_key) == ("here", 2, 2, "secret")
        assert args.cuda_graph_bs_decode == [8]


@pytest.mark.parametrize("argv", [[], ["--radix-eviction-policy", "lru"], ["--radix-eviction-policy=lru"]])
def test_whether_the_eviction_policy_was_named(config, argv, monkeypatch):
    seen = []
    stock = ShiftServerArgs.from_cli_args
    monkeypatch.setattr(ShiftServerArgs, "from_cli_args", lambda raw: seen.append(raw) or stock(raw))
    prepare_server_args(argv)
    prepare_server_args(["--config", config("radix-eviction-policy: lru\n" if argv else "")])
    assert [(r.radix_eviction_policy, r._radix_eviction_policy_explicitly_set) for r in seen] == 2 * [
        ("lru", bool(argv))
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- tp-size\n- 2\n", "holds a list"),
        ("tp-size\n", "holds a text"),
        ("7\n", "holds a number"),
        ("tp-size: [1, 2\n", "is no YAML"),
        ("tp-size: 2\n  sp-size: 2\n", "is no YAML"),
        ("a: 1\n---\nb: 1\n", "is no YAML"),
        ("tp-size: !!python/name:os.system\n", "is no YAML"),
        ("tp-size: 2024-99-99\n", "is no YAML"),
        ("tp-size: " + "[" * 5000 + "\n", "is no YAML"),
        (b"api-key: \xff\xfe\x00\n", "is no YAML"),
        (b"\x00\x01\x02", "is no YAML"),
        ("tp-size: 2\ntp-size: 4\n", "tp-size is given twice"),
        ("tp-size: 2\ntp_size: 4\n", "tp_size is given twice"),
        ("tp-size: 2\ntensor-parallel-size: 4\n", "tensor-parallel-size is given twice"),
        ("model-pth: there\n", "model-pth is not the name of a flag"),
        ("8: there\n", "8 is not the name of a flag"),
        ("? [a, b]\n: there\n", "is not the name of a flag"),
        ("--tp-size: 2\n", "--tp-size is not the name of a flag"),
        ("model-path:\n", "model-path has no value"),
        ("api-key: null\n", "api-key has no value"),
        ("enable-shift-parallel: 1\n", "enable-shift-parallel is true or false"),
        ("enable-shift-parallel: 'true'\n", "enable-shift-parallel is true or false"),
        ("enable-shift-parallel: [true]\n", "enable-shift-parallel is true or false"),
        ("tp-size: [2, 4]\n", "tp-size takes one value"),
        ("model-path: [a]\n", "model-path takes one value"),
        ("cuda-graph-bs-decode: [[1, 2]]\n", "cuda-graph-bs-decode has a list in its list"),
        ("cuda-graph-bs-decode: [{a: 1}]\n", "cuda-graph-bs-decode has a list in its list"),
        ("cuda-graph-bs-decode: &a [*a]\n", "is no YAML"),
        ("json-model-override-args: {a: 2024-05-10}\n", "json-model-override-args is no JSON"),
        ("json-model-override-args: &a {a: *a}\n", "is no YAML"),
        ("tp-size: two\n", "invalid int value: 'two'"),
        ("tp-size: 2.5\n", "invalid int value: '2.5'"),
        ("tp-size: true\n", "invalid int value: 'true'"),
        ("tp-size: {a: 1}\n", "invalid int value"),
        ("tp-size: 2\nload-format: nonsense\n", "invalid choice: 'nonsense'"),
        ("sp-size: auot\n", "neither a whole number of ranks nor 'auto'"),
        ("lora-paths: [a]\n", "lora-paths cannot be given in a file"),
        ("config: other.yaml\n", "config cannot be given in a file"),
        ("help: true\n", "help cannot be given in a file"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(config, content, message):
    path = config(content)
    with pytest.raises(ShiftError) as refusal:
        prepare_server_args(["--config", path])
    sentence = str(refusal.value)
    assert sentence.startswith(f"--config {path}") and message in sentence and "\n" not in sentence
    assert len(sentence) < 600 + len(path)


def test_a_file_that_cannot_be_read_is_one_sentence(config, tmp_path):
    (tmp_path / "folder.yaml").mkdir()
    for path, message in (
        (str(tmp_path / "missing.yaml"), "cannot be read: No such file"),
        (str(tmp_path / "folder.yaml"), "cannot be read: Is a directory"),
        (config("tp-size: 2\n", "config.txt"), "must end in .yaml or .yml"),
        ("", "must end in .yaml or .yml"),
    ):
        for argv in (["--config", path], [f"--config={path}"]):
            with pytest.raises(ShiftError, match=message):
                prepare_server_args(argv)


def test_a_wrong_value_is_not_told(config):
    """A key may stand behind a misspelt name, or in the line that is no YAML."""
    for content in ("api-kye: secret\n", "api-key: [secret\n", "api-key: secret: 5\n", "api-key: [secret]\n"):
        with pytest.raises(ShiftError) as refusal:
            prepare_server_args(["--config", config(content)])
        assert "secret" not in str(refusal.value)


def test_two_files_are_refused(config):
    with pytest.raises(ShiftError, match="--config is given twice"):
        prepare_server_args(["--config", config(FILE, "a.yaml"), "--conf", config(FILE, "b.yaml")])


def test_a_byte_order_mark_and_comments(config):
    for content in ("\ufeff" + FILE, "# only a comment\n---\n" + FILE, FILE.encode("utf-16")):
        assert prepare_server_args(["--config", config(content)]).api_key == "secret"
    for nothing in ("", "# nothing\n", "---\n", "null\n", "{}\n"):
        assert prepare_server_args(["--config", config(nothing), "--model", "there"]).tp_size == 1


@pytest.mark.parametrize("level", ["loud", "handlers", "basic_format", "7"])
def test_an_unknown_log_level_is_one_sentence(level):
    with pytest.raises(ShiftError, match=f"--log-level {level} is unknown"):
        prepare_server_args(["--log-level", level])


# `sglang serve`


@pytest.mark.parametrize(
    ("argv", "ours"),
    [
        ("m --enable-shift", True), ("m --sp-s 2", True), ("m --sp-s=2", True), ("m --seq 2", True),
        ("m --shift-po tp", True), ("m --shift 5", True), ("m --shift-exchange-d fp8", True),
        ("m --sp 2", False), ("m --enable 2", False), ("m --enable-s", False), ("m --sh", False), ("m --", False),
        ("m --show-time-cost", False), ("m --sp-sizes 2", False), ("m --enable-symm-mem", False), ("--sp-size", True),
        ("m --served-model-name sp-size", False), ("m --api-key=--sp-size", False),
    ],
)  # fmt: skip
def test_sglang_serve_finds_our_flags_abbreviated(argv, ours):
    assert has_shift_flag(tuple(argv.split())) is ours


@pytest.mark.parametrize("flag", ["--config {}", "--config={}", "--conf {}", "--confi={}"])
def test_sglang_serve_finds_our_flags_in_the_file(config, flag):
    def asked(content: str | bytes) -> bool:
        return has_shift_flag(("m", *flag.format(config(content)).split(), "--tp-size", "2"))

    for name in ("sp-size", "sp_size", "enable_shift_parallel", "sequence_parallel_size", "shift-policy"):
        assert asked(f"tp-size: 2\n{name}: 2\n")
    for stock in ("tp-size: 2\n", "", "- sp-size\n", "sp-size\n", "7\n", "a: [", b"\xff\xfe\x00", "8: 1\n"):
        assert not asked(stock)
    assert not has_shift_flag(tuple(flag.format("/missing.yaml").split()))
    assert not has_shift_flag(("m", "--config")) and not has_shift_flag(("m", "--con", config("sp-size: 2\n")))


# scripts/serve.sh


@pytest.fixture
def serve(tmp_path):
    """The script with a set-up that does nothing and a Python that shows what it was asked for."""
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts/serve.sh", tmp_path / "scripts")
    (tmp_path / "scripts/setup.sh").write_text("#!/bin/sh\n")
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text('#!/bin/sh\nshift 2\necho "$@"\n')
    for program in ("scripts/setup.sh", ".venv/bin/python"):
        (tmp_path / program).chmod(0o755)

    def run(flags: str) -> str:
        command = [str(tmp_path / "scripts/serve.sh"), *flags.split()]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ).stdout.strip()

    return run


@pytest.mark.parametrize(
    ("flags", "added"),
    [
        ("", "--enable-shift-parallel --tp-size 2"),
        ("--model-pa m --port 5", "--enable-shift-parallel --tp-size 2"),
        *((f"{tp} 4", "--enable-shift-parallel") for tp in ("--tp-size", "--tp", "--tp-s", "--tensor", "--te")),
        *((f"{sp} 2", "--tp-size 2") for sp in ("--sp-size", "--sp-s", "--sequence-parallel-size", "--seq")),
        ("--enable-shift-parallel", "--tp-size 2"),
        ("--enable-shift", "--tp-size 2"),
        ("--enable-shared-experts-attn-tp", "--enable-shift-parallel --tp-size 2"),
        *((f"{c}f.yaml", "") for c in ("--config=", "--config ", "--conf=", "--conf ")),
        ("--tp=4 --sp-s=2", ""),
        ("--served-model-name tp-size", "--enable-shift-parallel --tp-size 2"),
    ],
)
def test_what_the_script_adds(serve, flags, added):
    assert serve(flags) == f"{flags} {added}".strip()


@pytest.mark.parametrize(
    ("flags", "announced"),
    [
        ("--port 31000", True),
        *((f"{config} --node-rank 0", False) for config in ("--config f.yaml", "--config=f.yaml", "--conf f.yaml")),
        ("--node-rank 1", False),
        ("--help", False),
    ],
)
def test_where_the_server_is_ready(serve, tmp_path, monkeypatch, flags, announced):
    """A file of --config may have the address, and the script does not read it."""
    (tmp_path / "bin").mkdir()
    for program, lines in (("bin/curl", ""), (".venv/bin/python", "sleep 2\n")):  # the script asks after one second
        (tmp_path / program).write_text(f"#!/bin/sh\n{lines}")
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    said = serve(flags)
    assert ("ready at http://127.0.0.1:31000" in said) is announced and ("ready at" in said) is announced
