"""Traces from files: what is read, and what is refused with its line."""

from __future__ import annotations

import json

import pytest
from sglang_shift.simulate.traces import MAX_TOKENS, read_azure, read_mooncake, read_trace
from sglang_shift.simulate.traffic import Request

HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens"
ROW = '{"timestamp": 0, "input_length": 8, "output_length": 2}'


def azure(tmp_path, *lines, end="\n", name="trace.csv", encoding="utf-8"):
    file = tmp_path / name
    file.write_bytes(end.join(lines).encode(encoding))
    return file


def mooncake(tmp_path, *lines, end="\n"):
    return azure(tmp_path, *lines, end=end, name="trace.jsonl")


def entry(**changes):
    return json.dumps({"timestamp": 0, "input_length": 8, "output_length": 2} | changes)


class TestAzure:
    @pytest.mark.parametrize(
        ("first", "second"),
        [
            ("2023-11-16 18:17:03.9799600", "2023-11-16 18:17:05.4799600"),
            ("2024-05-10 00:00:00.009930+00:00", "2024-05-10 00:00:01.509930+00:00"),
            ("2024-05-10 00:00:00+00:00", "2024-05-10 00:00:01.5+00:00"),
            ("2024-05-10T00:00:00Z", "2024-05-10T00:00:01.500000Z"),
            ("2024-05-10 02:00:00+02:00", "2024-05-10 00:00:01.5+00:00"),
            ("2024-05-10", "2024-05-10 00:00:01.5"),
            (" 2024-05-10 00:00:00 ", " 2024-05-10 00:00:01.5 "),
        ],
    )
    def test_timestamps(self, tmp_path, first, second):
        requests = read_azure(azure(tmp_path, HEADER, f"{first},4808,10", f"{second},3180,8"))
        assert [(r.prompt, r.output) for r in requests] == [(4808, 10), (3180, 8)]
        assert [r.time for r in requests] == pytest.approx([0, 1.5], abs=1e-6)

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
    @pytest.mark.parametrize("header", [HEADER, " timestamp , context_tokens ,generated tokens", f'"{HEADER}",note'])
    def test_spellings_of_the_file(self, tmp_path, end, encoding, header):
        header = header.replace(",", '","', 2) if header.startswith('"') else header
        lines = ("", header, "", '"2024-05-10 00:00:00", 4808 ,"10"', "  ", ",,", "2024-05-10 00:00:01,3180.0,8", "")
        requests = read_azure(azure(tmp_path, *lines, end=end, encoding=encoding))
        assert [(r.time, r.prompt, r.output) for r in requests] == [(0, 4808, 10), (1, 3180, 8)]

    @pytest.mark.parametrize("delimiter", [";", "\t"])
    def test_other_delimiters(self, tmp_path, delimiter):
        lines = (HEADER, "2024-05-10 00:00:00,4808,10")
        file = azure(tmp_path, *(line.replace(",", delimiter) for line in lines))
        assert read_azure(file) == [Request(0, 4808, 10)]

    @pytest.mark.parametrize("name", ["trace.csv", "TRACE.CSV", "trace.tsv", "trace.Csv"])
    def test_its_name(self, tmp_path, name):
        file = azure(tmp_path, HEADER, "2024-05-10 00:00:00,4808,10", name=name)
        assert read_trace(file) == read_azure(file) == [Request(0, 4808, 10)]

    def test_any_order_and_rows_without_tokens(self, tmp_path):
        rows = ("2024-05-10 00:00:09,1,1", "2024-05-10 00:00:00,0,7", "2024-05-10 00:00:04,2,2")
        assert read_azure(azure(tmp_path, HEADER, *rows)) == [Request(0, 2, 2), Request(5, 1, 1)]

    @pytest.mark.parametrize(
        ("row", "problem"),
        [
            ("2024-05-10 00:00:61,1,1", "TIMESTAMP '2024-05-10 00:00:61' is not a time in ISO 8601"),
            ("5/10/2024 0:00,1,1", "TIMESTAMP '5/10/2024 0:00' is not a time"),
            ("1710122200000,1,1", "TIMESTAMP '1710122200000' is not a time"),  # else the year 1710
            ("nan,1,1", "TIMESTAMP 'nan' is not a time"),
            (",1,1", "TIMESTAMP '' is not a time"),
            ("2024-05-10 00:00:00Z,1,1", "TIMESTAMP '2024-05-10 00:00:00Z' has a zone, unlike those before"),
            ("2024-05-10 00:00:00,1", "no GeneratedTokens"),
            ("2024-05-10 00:00:00", "no ContextTokens"),
            ("2024-05-10 00:00:00,x,1", "ContextTokens 'x' is not a whole number from 0 to"),
            ("2024-05-10 00:00:00,1.5,1", "ContextTokens '1.5' is not a whole number"),
            ("2024-05-10 00:00:00,-1,1", "ContextTokens '-1' is not a whole number"),
            ("2024-05-10 00:00:00,1,nan", "GeneratedTokens 'nan' is not a whole number"),
            ("2024-05-10 00:00:00,1,inf", "GeneratedTokens 'inf' is not a whole number"),
            ("2024-05-10 00:00:00,1,", "GeneratedTokens '' is not a whole number"),
            (f"2024-05-10 00:00:00,{MAX_TOKENS + 1},1", "ContextTokens '1000000001' is not a whole number"),
            (f"2024-05-10 00:00:00,{'1' * 5000},1", r"ContextTokens '1+\.\.\.1+' is not a whole number"),
            (f"2024-05-10 00:00:00,{'1' * 200_000},1", "field larger"),
            ('2024-05-10 00:00:00,"1,1', "unexpected end of data"),
        ],
    )
    def test_a_broken_row_is_refused_with_its_line(self, tmp_path, row, problem):
        file = azure(tmp_path, HEADER, "", "2024-05-10 00:00:00,1,1", row, "", "")
        with pytest.raises(ValueError, match=f"^line 4: .*{problem}") as refused:
            read_azure(file)
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 300

    def test_lines_are_counted_in_the_file(self, tmp_path):
        rows = ('2024-05-10 00:00:00,1,1,"a note\nof two lines"', "2024-05-10 00:00:00,x,1,")
        with pytest.raises(ValueError, match=r"^line 4: ContextTokens 'x'"):
            read_azure(azure(tmp_path, HEADER + ",note", *rows))

    @pytest.mark.parametrize(
        ("content", "problem"),
        [
            (b"", "^it is empty$"),
            (b"\n\r\n  \n", "^it is empty$"),
            (HEADER.encode(), "^it has no request with a prompt and an output$"),
            (HEADER.encode() + b"\n2024-05-10,0,1\n", "^it has no request with a prompt and an output$"),
            (b"\na,b,c\n1,2,3\n", "^line 2: the columns are 'a', 'b', 'c'; TIMESTAMP, ContextTokens, GeneratedTokens "),
            (HEADER.encode("utf-16"), "^line 1: the columns are"),
            (b"\x1f\x8b\x08\x00\xff", "^line 1: the columns are"),
            (HEADER.encode() + b"\n\xff,1,1\n", r"^line 2: TIMESTAMP '\\+xff' is not a time"),
            (f"{HEADER},{HEADER}\n".encode(), "^line 1: there are two columns TIMESTAMP$"),
        ],
    )
    def test_other_files_are_refused(self, tmp_path, content, problem):
        file = tmp_path / "trace.csv"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            read_azure(file)

    def test_a_folder(self, tmp_path):
        for read in (read_azure, read_mooncake, read_trace):
            with pytest.raises(OSError, match="Is a directory"):
                read(tmp_path)


class TestMooncake:
    def test_spellings(self, tmp_path):
        lines = (
            entry(timestamp=3000.5, hash_ids=None),
            "  ",
            entry(timestamp=1000, hash_ids=[3, 4], input_length=9.0),
            entry(timestamp=2000, hash_ids=[], note="a line\u2028of two\x0b"),
            "",
        )
        expected = [Request(0, 9, 2, (3, 4), 512.0), Request(1, 8, 2), Request(2.0005, 8, 2)]
        for end in ("\n", "\r\n"):
            file = mooncake(tmp_path, *lines, end=end)
            assert read_mooncake(file) == read_trace(file) == expected
        file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert read_mooncake(file) == expected

    def test_separators_of_text_are_none_of_lines(self, tmp_path):
        line = json.dumps({"note": "\u2028\x85", **json.loads(ROW)}, ensure_ascii=False)
        assert read_mooncake(mooncake(tmp_path, line)) == [Request(0, 8, 2)]

    @pytest.mark.parametrize(
        ("line", "problem"),
        [
            ("a,b", "it is not JSON: Expecting value"),
            (ROW[:-1], "it is not JSON: Expecting"),
            (f"[{ROW}]", "it is not a JSON object"),
            ("null", "it is not a JSON object"),
            ("[" * 100_000, "it is not JSON: .*nested"),
            ('{"timestamp": 0, "input_length": 8}', "no output_length"),
            ("{}", "no timestamp"),
            (entry(timestamp=None), "timestamp None is not a number"),
            (entry(timestamp="0"), "timestamp '0' is not a number"),
            (entry(timestamp=True), "timestamp True is not a number"),
            (entry(timestamp=float("nan")), "timestamp nan is not a number"),
            (entry(timestamp=float("inf")), "timestamp inf is not a number"),
            (entry(timestamp=10**400), r"timestamp 10+\.\.\.0+ is not a number"),
            (entry(timestamp=1e300), r"timestamp 1e\+300 is not a number"),
            (ROW.replace("8", "1" * 5000), "it is not JSON: .*limit"),
            (entry(input_length=-1), "input_length -1 is not a whole number from 0 to"),
            (entry(input_length=1.5), "input_length 1.5 is not a whole number"),
            (entry(input_length=float("nan")), "input_length nan is not a whole number"),
            (entry(input_length=MAX_TOKENS + 1), "input_length 1000000001 is not a whole number"),
            (entry(output_length=True), "output_length True is not a whole number"),
            (entry(output_length="2"), "output_length '2' is not a whole number"),
            (entry(output_length=None), "output_length None is not a whole number"),
            (entry(hash_ids=[1, "2"]), "hash_ids has '2', which is not a whole number"),
            (entry(hash_ids=[True]), "hash_ids has True, which is not a whole number"),
            (entry(hash_ids=7), "hash_ids 7 is not a list"),
            (entry(hash_ids="12"), "hash_ids '12' is not a list"),
        ],
    )
    def test_a_broken_line_is_refused_with_its_number(self, tmp_path, line, problem):
        with pytest.raises(ValueError, match=f"^line 3: {problem}") as refused:
            read_mooncake(mooncake(tmp_path, ROW, "", line, ROW))
        assert "\n" not in str(refused.value) and len(str(refused.value)) < 300

    def test_other_files_are_refused(self, tmp_path):
        for lines, problem in (
            ((), "^it is empty$"),
            (("", " "), "^it is empty$"),
            ((entry(input_length=0),), "^it has no request with a prompt and an output$"),
            (("\x1f\x8b\x08", ROW), "^line 1: it is not JSON"),
        ):
            with pytest.raises(ValueError, match=problem):
                read_mooncake(mooncake(tmp_path, *lines))
