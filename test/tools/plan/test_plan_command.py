"""``python -m sglang_shift.plan``: plans, pictures and refusals."""

from __future__ import annotations

import importlib.util
import random
import re
import sys

import pytest
from plan_models import config, known_config
from sglang_shift.tools.plan import command


class TestCommand:
    @pytest.fixture
    def trace(self, tmp_path):
        rng = random.Random(0)
        lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
        for i in range(40):
            lines.append(f"2023-11-16 18:00:{i:02d}.1234567,{rng.randint(100, 3000)},{rng.randint(1, 40)}")
        file = tmp_path / "trace.csv"
        file.write_text("\n".join(lines))
        return file

    def test_a_plan(self, tmp_path, trace, capsys):
        arguments = ["--model", str(config(tmp_path)), "--gpus", "2xH100", "--trace", str(trace)]
        assert command.main([*arguments, "--window", "0", "29.5", "--pace", "2"]) == 0
        printed = capsys.readouterr().out
        assert "30 requests of trace.csv, second 0 to 29.5, 2 times as fast" in printed
        assert "Recommended: " in printed and "--tp-size" in printed
        assert "quantized" not in printed
        assert f"--model-path {tmp_path} " in printed
        assert "cut to" not in printed
        assert printed.count("| **") >= 2  # the best, in both tables

    def test_a_bound_on_the_gap_between_tokens(self, tmp_path, trace, capsys):
        arguments = ["--model", str(config(tmp_path)), "--gpus", "2xH100", "--trace", str(trace)]
        assert command.main([*arguments, "--tbt-target", "7.5"]) == 0
        plan, gaps = capsys.readouterr().out.split("## Gaps between tokens, with a bound of 7.5 ms")
        assert "Recommended: " in plan
        assert "| target 7.5 ms, mixed |" in gaps and "| target 7.5 ms, in turns |" in gaps
        assert "| TP | mixed, 2048 |" in gaps

    def test_the_study_of_long_prompts(self, capsys):
        assert command.main(["--check", "--tbt-target", "100"]) == 0
        printed = capsys.readouterr()
        rows = [
            [cell.strip() for cell in line.split("|")[1:-1]] for line in printed.out.split("## 1.4")[1].splitlines()
        ]
        cells = {tuple(row[:2]): [float(cell.replace(",", "")) for cell in row[2:]] for row in rows[4:] if row}
        ttft, _, mean_gap, _, longest_gap, end_to_end = cells["shift", "target 100 ms, mixed"]
        sarathi = cells["TP", "mixed, 2048"]
        assert longest_gap <= 100 < sarathi[4]
        assert ttft < sarathi[0] / 7 and mean_gap < sarathi[2] / 2 and end_to_end < sarathi[5] / 3
        assert cells["shift", "prompts first, 8192"][4] > 5000
        assert "shift, target 100 ms, mixed" in printed.err

    def test_made_up_traffic_and_a_quantized_model(self, tmp_path, capsys):
        file = config(tmp_path, quantization_config={"quant_method": "fp8"})
        arguments = ["--model", str(file), "--gpus", "1xH200", "--rate", "5", "--requests", "20"]
        assert command.main([*arguments, "--prompt", "100-200", "--output", "5", "--kv-cache-dtype", "fp8"]) == 0
        printed = capsys.readouterr().out
        assert "20 requests at 5/s, prompts of 100 to 200 tokens and outputs of 5.\n" in printed
        assert "(fp8, KV cache in fp8) on 1 x H200" in printed
        assert "--kv-cache-dtype fp8_e4m3" in printed

    def test_a_cache_that_is_divided_by_token(self, tmp_path, capsys):
        arguments = ["--model", str(config(tmp_path, num_key_value_heads=1)), "--gpus", "2xH200", "--rate", "5"]
        assert command.main([*arguments, "--requests", "5", "--prompt", "100", "--dcp-size", "auto"]) == 0
        printed = capsys.readouterr().out
        assert ("--dcp-size 2 --attention-backend triton" in printed) is ("of P = 2 GPUs" in printed.splitlines()[4])

    @pytest.mark.parametrize("text", ["0", "9", "half"])
    def test_numbers_of_gpus_that_cannot_divide_it(self, text, capsys):
        with pytest.raises(SystemExit):
            command.parse(["--check", "--dcp-size", text])
        assert "is not a whole number from 1 to 8" in capsys.readouterr().err

    @pytest.mark.parametrize("copies", ["sharded", "replicated"])
    def test_a_mixture_of_experts(self, tmp_path, capsys, copies):
        file = known_config(tmp_path, "Qwen3-30B-A3B")
        arguments = ["--model", str(file), "--gpus", "2xH200", "--rate", "2", "--requests", "20", "--prompt", "8000"]
        assert command.main([*arguments, "--output", "5", "--experts", copies]) == 0
        printed = capsys.readouterr().out
        assert "8 of 128 compute a token, 3.4 of 30.5 billion parameters" in printed
        assert f"They are {copies} in SP" in printed
        given = "--shift-experts replicated" in printed
        assert given is (copies == "replicated" and "--sp-size" in printed)

    def test_latents_experts_and_a_format_without_figures(self, tmp_path, capsys):
        awq = {"quant_method": "awq", "bits": 4, "group_size": 128, "modules_to_not_convert": ["self_attn"]}
        file = known_config(tmp_path, "DeepSeek-V3", quantization_config=awq)
        arguments = ["--model", str(file), "--gpus", "8xH200", "--rate", "2", "--requests", "10", "--prompt", "800"]
        assert command.main([*arguments, "--output", "5"]) == 0
        printed = capsys.readouterr().out
        for words in (
            "(int4, KV cache in bfloat16)",
            "Every rank caches the latents of all tokens",
            "no figures for products of int4 weights. 4.16 bits a weight are read, and arithmetic has the rate of",
        ):
            assert words in printed

    def test_windows_are_not_regarded(self, tmp_path, capsys):
        file = known_config(tmp_path, "gpt-oss-20b")
        assert command.main(["--model", str(file), "--gpus", "1xH200", "--rate", "2", "--requests", "5"]) == 0
        assert "Layers with a sliding window count as if they attended to all tokens" in capsys.readouterr().out

    def test_experts_of_a_dense_model_are_refused(self, tmp_path, capsys):
        arguments = ["--model", str(config(tmp_path)), "--gpus", "1xH200", "--rate", "2", "--experts", "replicated"]
        assert command.main(arguments) == 2
        assert "has no experts; leave it out" in capsys.readouterr().err

    def test_what_is_cut_is_counted(self, tmp_path, capsys):
        file = config(tmp_path, max_position_embeddings=150)
        arguments = ["--model", str(file), "--gpus", "1xH200", "--rate", "5", "--requests", "20"]
        assert command.main([*arguments, "--prompt", "100-200", "--output", "20"]) == 0
        cut = re.search(r"outputs of 20; (\d+) of them cut to the context of 150 tokens", capsys.readouterr().out)
        assert cut and 0 < int(cut[1]) < 20

    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
    def test_a_picture(self, tmp_path, trace):
        picture = tmp_path / "plan.png"
        arguments = ["--model", str(config(tmp_path)), "--gpus", "2xH200", "--trace", str(trace)]
        assert command.main([*arguments, "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")

    @pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is optional")
    def test_a_picture_that_cannot_be_written_costs_no_plan(self, tmp_path, trace, capsys):
        arguments = ["--model", str(config(tmp_path)), "--gpus", "1xH200", "--trace", str(trace), "--plot"]
        assert command.main([*arguments, str(tmp_path)]) == 2
        printed = capsys.readouterr()
        assert "Recommended: " in printed.out
        assert "cannot be written: Is a directory" in printed.err
        assert command.main([*arguments, str(tmp_path / "none" / "plan.png")]) == 2
        printed = capsys.readouterr()
        assert "there is no folder" in printed.err
        assert "chunk" not in printed.err  # nothing was tried

    def test_a_picture_without_matplotlib_is_refused_first(self, tmp_path, trace, capsys, monkeypatch):
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
        arguments = ["--model", str(config(tmp_path)), "--gpus", "1xH200", "--trace", str(trace)]
        assert command.main([*arguments, "--plot", str(tmp_path / "plan.png")]) == 2
        assert capsys.readouterr().err.startswith("sglang_shift: error: plots need matplotlib")

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"--gpus": "8xB900"}, "there are no figures for a B900; give H100 or H200"),
            ({"--trace": "nothing.csv"}, "--trace nothing.csv cannot be read"),
            ({"--trace": "header.csv"}, "--trace header.csv cannot be read: line 1: the columns are 'a', 'b', 'c'; .*"),
            ({"--trace": "short.csv"}, "--trace short.csv cannot be read: line 2: no TIMESTAMP; give a .csv"),
            ({"--trace": "huge.csv"}, "--trace huge.csv cannot be read: line 2: field larger than field limit"),
            ({"--trace": "broken.jsonl"}, "--trace broken.jsonl cannot be read: line 2: no output_length; give"),
            ({"--trace": "empty.csv"}, "--trace empty.csv cannot be read: it is empty; give"),
            ({"--trace": "."}, r"--trace \. cannot be read: .*directory"),
            ({"--gpus": "H200"}, "--gpus 'H200' is not a number of GPUs and their kind; give for example 8xH200"),
            ({"--gpus": "8"}, "--gpus '8' is not a number of GPUs"),
            ({"--gpus": "0xH200"}, "--gpus 0xH200: .* give 1 to 8 GPUs"),
            ({"--gpus": "16xH200"}, "--gpus 16xH200: .* give 1 to 8 GPUs"),
            ({"--gpus": "1.5xH200"}, "--gpus '1.5xH200' is not a number of GPUs"),
            ({"--gpus": f"{'9' * 5000}xH200"}, "--gpus '9+xH200' is not a number of GPUs"),
            ({"--model": "nowhere"}, "nowhere: .*; give the config.json"),
            ({"--window": "5000 10"}, "has no request from second 5000 to 5010"),
        ],
    )
    def test_refusals_are_one_sentence(self, tmp_path, trace, capsys, monkeypatch, changes, problem):
        monkeypatch.chdir(tmp_path)
        columns = "TIMESTAMP,ContextTokens,GeneratedTokens"
        (tmp_path / "broken.jsonl").write_text(
            '{"timestamp": 0, "input_length": 1, "output_length": 1}\n{"timestamp": 0, "input_length": 1}\n'
        )
        (tmp_path / "empty.csv").touch()
        (tmp_path / "header.csv").write_text("a,b,c\n")
        (tmp_path / "short.csv").write_text("ContextTokens,GeneratedTokens,TIMESTAMP\n10,5\n")
        (tmp_path / "huge.csv").write_text(f"{columns}\n2023-11-16 18:17:04.5,{'1' * 200_000},5\n")
        given = {"--model": str(config(tmp_path)), "--gpus": "2xH100", "--trace": str(trace)} | changes
        arguments = [word for key, value in given.items() for word in (key, *value.split())]
        assert command.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("sglang_shift: error: ") and error.count("\n") == 1
        assert re.search(problem, error)

    @pytest.mark.parametrize(
        ("arguments", "problem"),
        [
            ([], "give --model, --gpus and one of --trace and --rate; or --check"),
            (["--model", "m", "--gpus", "8xH200"], "give --model, --gpus and one of"),
            (["--check", "--pace", "0"], "must be more than 0"),
            (["--check", "--prompt", "9-3"], "invalid lengths value: '9-3'"),
            *(
                (["--check", flag, value], f"argument {flag}: '{value}' must be more than 0, a number from 1e-06 to")
                for flag in ("--rate", "--pace")
                for value in ("0", "nan", "inf", "-1", "1e-300", "1e300", "x")
            ),
            *(
                (["--check", "--requests", value], f"'{value}' is not a whole number from 1 to 1000000")
                for value in ("0", "-1", "1.5", "nan", "1000001", "9" * 5000)
            ),
            (["--check", "--tbt-target", "0"], "argument --tbt-target: '0' must be more than 0"),
            (["--check", "--context-length", "1"], "'1' is not a whole number from 2 to 1000000000"),
            *(
                (["--check", "--prompt", value], f"invalid lengths value: '{value}'")
                for value in ("0", "100-", "-100", "1-2-3", "nan", "1000000001", "9" * 5000, "1-1000000001")
            ),
            *(
                (["--check", "--window", *words.split()], "--window takes a second to start at and more than 0 seconds")
                for words in ("nan 9", "0 nan", "0 0", "0 -9", "inf 9")
            ),
        ],
    )
    def test_arguments_that_make_no_sense(self, arguments, problem, capsys):
        with pytest.raises(SystemExit) as end:
            command.main(arguments)
        assert end.value.code == 2
        assert problem in capsys.readouterr().err

    @pytest.mark.parametrize("gpus", ["1xH200", "1 x h200", "1XH100"])
    def test_a_trace_of_one_request(self, tmp_path, capsys, gpus):
        (tmp_path / "one.CSV").write_text(
            "TIMESTAMP,ContextTokens,GeneratedTokens\r\n\r\n2024-05-10 00:00:00.009930+00:00,2162,5\r\n"
        )
        arguments = ["--model", str(config(tmp_path)), "--gpus", gpus, "--trace", str(tmp_path / "one.CSV")]
        assert command.main([*arguments, "--window", "0", "inf"]) == 0
        assert "1 requests of one.CSV, second 0 to inf" in capsys.readouterr().out

    def test_a_shorter_context_is_in_the_command(self, tmp_path, capsys):
        arguments = ["--model", str(config(tmp_path)), "--gpus", "1xH200", "--rate", "5", "--requests", "2"]
        for given in ([], ["--context-length", "150"]):
            assert command.main([*arguments, "--prompt", "200", *given]) == 0
            printed = capsys.readouterr().out
            assert ("--context-length 150" in printed) is bool(given)
            assert ("2 of them cut to the context of 150 tokens" in printed) is bool(given)

    def test_the_largest_sizes_do_not_fit(self, tmp_path, capsys):
        most = 2**31 - 1
        sizes = dict.fromkeys(("intermediate_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"), most)
        file = config(tmp_path, **sizes, hidden_size=2**30)
        assert command.main(["--model", str(file), "--gpus", "1xH200", "--rate", "1"]) == 2
        assert "does not fit 1 x H200" in capsys.readouterr().err
