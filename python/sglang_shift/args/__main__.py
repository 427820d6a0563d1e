"""``python -m sglang_shift.args flags`` prints ``docs/flags.md``; ``... refusals`` prints ``docs/refusals.md``."""

from __future__ import annotations

import argparse

from sglang_shift.args import pages

PAGES = {"flags": pages.flags_page, "refusals": pages.refusals_page}


def main() -> None:
    """Print the page that the command line names."""
    parser = argparse.ArgumentParser(prog="python -m sglang_shift.args", description="Print a page of the documents.")
    parser.add_argument("page", choices=PAGES)
    print(PAGES[parser.parse_args().page](), end="")


if __name__ == "__main__":
    main()
