"""A damaged calibration file costs a calibration, never a server."""

from __future__ import annotations

import json

import calibrations
import msgspec
import pytest
from sglang_shift.cost.calibration import MAX_MEASUREMENTS, Calibration, CalibrationError, load

KEY = {"architecture": "X"}


def content():
    made = Calibration.from_measurements(KEY, 1.0, calibrations.measurements("crossovers-differ"), 1e-5)
    return json.loads(msgspec.json.encode(made))


def refusal(tmp_path, text):
    file = tmp_path / "c.json"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(CalibrationError) as error:
        load(file, KEY)
    assert str(file) in str(error.value) and len(str(error.value)) < 500
    return str(error.value)


def test_the_undamaged_one(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps(content()))
    loaded = load(tmp_path / "c.json", KEY)
    assert json.loads(msgspec.json.encode(loaded)) == content() | {"made": loaded.made}


# Of ``json.loads``: NaN, infinities, and integers of any size.
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("tokens", bad) for bad in (0, -1, 1.5, True, "8", None, 2**31, 10**400, float("nan"))),
        *(("kv_reads", bad) for bad in (-1, 1.5, True, "8", None, 10**400, float("inf"))),
        *(("seconds", bad) for bad in (0.0, -1.0, "1", True, None, float("nan"), float("inf"), 1e300, 10**400)),
        *(("phase", bad) for bad in ("warm-up", None, 7, ["prefill"])),
        *(("mode", bad) for bad in ("dp", None, ["tp"])),
    ],
)
def test_a_damaged_measurement(tmp_path, field, value):
    """Later calibrations are fitted to the measurements as well."""
    damaged = content()
    damaged["measurements"][3][field] = value
    assert "it is not a calibration" in refusal(tmp_path, json.dumps(damaged))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("took", float("nan")),
        ("took", 10**400),
        ("took", True),
        ("measurements", None),
        ("measurements", {}),
        ("measurements", [7]),
        ("measurements", [{"phase": "decode", "mode": "tp", "tokens": 1, "kv_reads": 0, "seconds": 1}] * 10_001),
        ("costs", 7),
        ("key", 7),
    ],
)
def test_other_damage(tmp_path, name, value):
    assert MAX_MEASUREMENTS == 10_000
    refusal(tmp_path, json.dumps(content() | {name: value}))


def test_what_is_no_calibration_at_all(tmp_path):
    for text in ("", "7", "[" * 100_000, b"\xff\x00", b"\x00" * 10_000, '{"format": ' + "1" * 5000 + "}"):
        refusal(tmp_path, text)
    assert "is larger than a calibration" in refusal(tmp_path, json.dumps(content()) + " " * 10**7)
    with pytest.raises(CalibrationError, match="cannot be read"):
        load(tmp_path, KEY)
