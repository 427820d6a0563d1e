"""Defines a calibration: measured step times, the settings that they depend on, and the file that stores them."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import msgspec
import torch

from sglang_shift.config import ShiftConfig
from sglang_shift.cost.exchange_gain import ExchangeGain, first_tokens
from sglang_shift.cost.model import CostModel, Measurement, NotNegative, fit
from sglang_shift.modes import Mode

FORMAT = 2
"""Format of a file. A saved file of another format is measured again; one that the user names is left as it is."""
CACHE_VARIABLE = "SGLANG_SHIFT_CACHE_DIR"
"""Environment variable that names the folder of saved calibrations."""

MAX_BYTES, MAX_MEASUREMENTS = 4 << 20, 10_000
"""Limits of a file: its bytes and its measurements. A usual file has some tens of KiB and hundreds of measurements."""


class CalibrationError(Exception):
    """A calibration cannot be made or used, so the server continues without it. The message is one sentence.

    Attributes:
        broken: The mode that cannot run, if that is the cause.
    """

    def __init__(self, message: str, broken: Mode | None = None) -> None:
        super().__init__(message)
        self.broken = broken


@dataclass(frozen=True)
class Calibration:
    """Step times of one model on one machine, as a file stores them.

    Attributes:
        key: The settings that the times depend on: model, hardware, sizes, versions.
        made: The date and time at which it was made, ISO 8601.
        took: Seconds that the measurement took.
        measurements: The measured step times.
        costs: The cost model, which is fitted to the measurements.
        format: Format of the file.
        exchange_gains: What the pipelined exchange gains in SP prefills. It is empty if it was not measured.
    """

    key: dict[str, Any]
    made: str
    took: NotNegative
    measurements: Annotated[tuple[Measurement, ...], msgspec.Meta(max_length=MAX_MEASUREMENTS)]
    costs: CostModel
    format: int = FORMAT
    exchange_gains: Annotated[tuple[ExchangeGain, ...], msgspec.Meta(max_length=MAX_MEASUREMENTS)] = ()

    @property
    def pipelined_from(self) -> int | None:
        """The tokens from which SP prefills are pipelined; None if the pipelined exchange wins nowhere."""
        return first_tokens(self.exchange_gains)

    def with_measurements(
        self, took: float, measurements: Sequence[Measurement], switch_seconds: float | None
    ) -> Calibration:
        """Return this calibration with new measurements.

        Beyond the range of the new measurements, the old measurements and the old ratios of the modes' times stay.

        Args:
            took: Seconds that the new measurement took.
            measurements: The new measurements.
            switch_seconds: Seconds that a change of mode costs; None if they were not measured.

        Raises:
            CalibrationError: there are no new measurements.
        """
        if not measurements:
            raise CalibrationError("there was no room in the KV pool for any step to measure")
        # The most KV reads among the new measurements, by phase and number of tokens.
        covered: dict[tuple[str, int], int] = {}
        for m in measurements:
            covered[m.phase, m.tokens] = max(m.kv_reads, covered.get((m.phase, m.tokens), 0))
        kept = [m for m in self.measurements if m.kv_reads > covered.get((m.phase, m.tokens), -1)]
        switch = self.costs.switch_seconds if switch_seconds is None else switch_seconds
        phases = {m.phase for m in measurements}
        others = [m for m in self.measurements if m.phase not in phases]
        new = Calibration.from_measurements(self.key, took, [*others, *measurements], switch)
        costs = new.costs.extended_by(self.costs, measurements)
        return replace(new, measurements=(*kept, *measurements), costs=costs, exchange_gains=self.exchange_gains)

    @staticmethod
    def from_measurements(
        key: dict[str, Any], took: float, measurements: Sequence[Measurement], switch_seconds: float
    ) -> Calibration:
        """Fit a cost model to measurements, and date the calibration.

        Raises:
            CalibrationError: there are too few measurements.
        """
        try:
            costs = fit(measurements, switch_seconds)
        except ValueError as error:
            raise CalibrationError(f"the calibration is incomplete: {error}") from error
        return Calibration(key, datetime.now(UTC).isoformat(timespec="seconds"), took, tuple(measurements), costs)


class _FileHeader(msgspec.Struct):
    """The part that a calibration file of any format has."""

    format: int


def key_of(config: ShiftConfig, model_config: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that step times depend on.

    Args:
        config: The settings of the server, which contain P, S, and where the experts are.
        model_config: SGLang's model configuration. Its Hugging Face configuration identifies the model's shapes.
        settings: All other settings that matter: chunk size, attention backend, dtype of the KV cache, nodes.
    """
    shapes = json.dumps(model_config.hf_config.to_dict(), sort_keys=True, default=str)
    return {
        "architecture": (model_config.hf_config.architectures or ["unknown"])[0],
        "shapes": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "dtype": str(model_config.dtype),
        "tp_size": config.world_size,
        "sp_size": config.sp_size,
        "experts": config.experts,
        "hardware": hardware(),
        "versions": {name: version(name) for name in ("sglang", "sglang_shift", "torch")},
        **settings,
    }


def hardware() -> str:
    """Name this machine's accelerator, or its processor, cores and threads per rank."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()} x {torch.cuda.device_count()}"
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return f"{(names or [platform.machine()])[0]} x {os.cpu_count()}, {torch.get_num_threads()} threads a rank"


def cache_folder() -> Path:
    """Return the folder of saved calibrations. A user without a home (in a container) gets a temporary folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder)
    cache = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(cache or Path.home() / ".cache", "sglang_shift", "calibrations")
    except RuntimeError:  # there is neither HOME nor an entry in the user database
        return Path(tempfile.gettempdir(), f"sglang_shift-{os.getuid()}", "calibrations")


def cache_file(key: dict[str, Any]) -> Path:
    """Return the path of the calibration with this key."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return Path(cache_folder(), f"{digest}.json")


def file_of_level(path: Path, level: int) -> Path:
    """Return the path of the calibration of one level of instances: for two ranks, ``own.2.json`` of ``own.json``."""
    return path.with_name(f"{path.stem}.{level}{path.suffix}")


def load(path: Path, key: dict[str, Any]) -> Calibration:
    """Read a calibration that was made for ``key``.

    Raises:
        FileNotFoundError: the file does not exist.
        CalibrationError: the file cannot be read, or has another key. Then the message names what differs.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CalibrationError(f"the calibration {path} cannot be read: {error}") from error
    if len(content) > MAX_BYTES:
        raise CalibrationError(f"the calibration {path} cannot be read: it is larger than a calibration")
    calibration = _decode(path, content)
    theirs = calibration.key
    if differing := [name for name in {**key, **theirs} if key.get(name) != theirs.get(name)]:
        pairs = ", ".join(f"{name} is {theirs.get(name)} there and {key.get(name)} here" for name in differing)
        raise CalibrationError(f"the calibration {path} was made for something else: {pairs}")
    return calibration


def _decode(path: Path, content: bytes) -> Calibration:
    try:
        file_format = msgspec.json.decode(content, type=_FileHeader).format
        if file_format != FORMAT:
            raise CalibrationError(f"the calibration {path} cannot be used: it has format {file_format}, not {FORMAT}")
        return msgspec.json.decode(content, type=Calibration)
    except msgspec.ValidationError as error:
        raise CalibrationError(f"the calibration {path} cannot be used: it is not a calibration ({error})") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CalibrationError(f"the calibration {path} cannot be read: it is not a calibration ({error})") from error


def save(path: Path, calibration: Calibration) -> None:
    """Write a calibration. Readers see the old file or the new file, and never a part of a file.

    Raises:
        CalibrationError: the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        content = msgspec.json.format(msgspec.json.encode(calibration), indent=1)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
            file.write(content)
        os.replace(file.name, path)
    except OSError as error:
        raise CalibrationError(f"the calibration {path} cannot be written: {error}") from error
