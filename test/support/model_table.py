"""Tries every tiny model in every layout, and writes the table of ``docs/data/models.csv``.

    python test/support/model_table.py --table docs/data/models.csv

A number is the largest distance of a logit, over all patterns of modes, from transformers' logits (or from TP's, for
models that transformers does not have), in standard deviations of the logits. The weights are random, in float32.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from model_trial import TrialError, difference, reason, trial
from tiny_models import MODELS, TinyModel, write

LAYOUTS: dict[str, dict[str, Any]] = {
    "stock TP=2": {"tp_size": 2, "stock": True},
    "P=2 S=2": {"tp_size": 2, "sp_size": 2},
    "P=4 S=2": {"tp_size": 4, "sp_size": 2},
    "P=4 S=4": {"tp_size": 4, "sp_size": 4},
}
COLUMNS = ("model", "architecture", "kind", "reference", *LAYOUTS, "not served because")


def row(name: str, model: TinyModel) -> dict[str, str]:
    """Return the row of a model. It is tried unless its record says that stock SGLang does not serve it."""
    reference = "none" if model.dummy else "transformers"
    cells = {"model": name, "architecture": model.architecture, "kind": model.group, "reference": reference}
    if model.stock:
        return {**cells, "not served because": f"stock SGLang: {model.stock}"}
    with tempfile.TemporaryDirectory(prefix="sglang_shift_tiny_") as folder:
        expected = write(model, folder)
        for title, layout in LAYOUTS.items():
            if model.refused and not layout.get("stock"):
                return {**cells, "not served because": "SGLang runs transformers' class, which SP mode cannot divide"}
            if model.dummy and layout.get("stock"):
                continue
            try:
                outcome = trial(folder, flags=model.flags, **layout)
            except TrialError as error:
                return {**cells, "not served because": f"{title}: {reason(str(error))}"}
            wanted = outcome.logits["tp"] if expected is None else expected
            cells[title] = f"{max(difference(logits, wanted) for logits in outcome.logits.values()):.1e}"
    return cells


def rows() -> Iterator[dict[str, str]]:
    for name, model in MODELS.items():
        cells = row(name, model)
        print(*cells.values(), sep="  ", flush=True)
        yield cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="the file to write")
    table = parser.parse_args().table
    finished = list(rows())
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(finished)


if __name__ == "__main__":
    main()
