"""``python -m sglang_shift.models`` prints ``docs/models.md``."""

from __future__ import annotations

from sglang_shift.models.document import document

if __name__ == "__main__":
    print(document(), end="")
