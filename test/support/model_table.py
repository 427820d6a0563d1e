"""Tries every tiny model in every layout, and writes the table of ``docs/data/models.csv``.

    python test/support/model_table.py --table docs/data/models.csv

A number is the largest distance of a logit, over all patterns of modes, from transformers' logits (or from TP's, for
models that transformers does not have), in standard deviations of the logits. The weights are random, in float32.
A model that the file has already is not tried again. Remove the file, or the model's line, to try it again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
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


def read(table: Path) -> dict[str, dict[str, str]]:
    """Return the rows of the file, by model."""
    if not table.exists():
        return {}
    with table.open(newline="") as file:
        return {cells["model"]: cells for cells in csv.DictReader(file)}


def save(table: Path, rows: dict[str, dict[str, str]]) -> None:
    """Write the rows in the order of the models."""
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows[name] for name in MODELS if name in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, required=True, help="the file to write")
    parser.add_argument("names", nargs="*", default=list(MODELS), help="names of tiny_models; all if none is given")
    arguments = parser.parse_args()
    rows = read(arguments.table)
    for name in arguments.names:
        if name not in rows:
            rows[name] = row(name, MODELS[name])
            print(*rows[name].values(), sep="  ", flush=True)
            save(arguments.table, rows)


if __name__ == "__main__":
    main()
