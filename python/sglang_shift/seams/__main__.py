"""``python -m sglang_shift.seams`` writes the digests of the installed SGLang, and the tables in ``docs/seams.md``."""

from __future__ import annotations

import sys
from pathlib import Path

from sglang_shift.errors import SeamError
from sglang_shift.seams import table

DIGESTS = Path(__file__).parent / "digests.py"
DOCUMENT = Path(__file__).parents[3] / "docs" / "seams.md"


def main() -> int:
    """Write both files, or neither."""
    try:
        if not DOCUMENT.is_file():
            raise SeamError(f"there is no {DOCUMENT}; run this in a checkout of the repository")
        texts = {DIGESTS: table.digests(), DOCUMENT: table.document(DOCUMENT.read_text())}
    except SeamError as error:
        print(f"sglang_shift: error: {error}", file=sys.stderr)
        return 2
    for file, text in texts.items():
        changed = file.read_text() != text
        file.write_text(text)
        print(f"{file}: {'written' if changed else 'unchanged'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
