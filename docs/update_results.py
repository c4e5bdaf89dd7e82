"""Copies the tables of docs/results into the documents, between the markers that name them.

Run by `make results` after the measurements; tests/test_readme.py checks that nobody forgot.
"""

import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
DOCUMENTS = (DOCS.parent / "README.md", DOCS / "reproduction.md", DOCS / "kernels.md")
SECTION = re.compile(r"(<!-- results: (\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def with_results(text: str) -> str:
    """Return a document's text with every marked section replaced by its table."""
    return SECTION.sub(
        lambda found: (
            f"{found[1]}\n{(DOCS / 'results' / f'{found[2]}.md').read_text()}\n{found[3]}"
        ),
        text,
    )


def main() -> None:
    """Update every document in place."""
    for document in DOCUMENTS:
        document.write_text(with_results(document.read_text()))
        print(f"updated {document.name}", file=sys.stderr)


if __name__ == "__main__":
    main()
