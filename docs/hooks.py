"""What the site has beside the pages of this folder: the examples, the benchmarks' page, and the changes.

Documents link to these as files of the repository (`../examples/bank.py`), so that the links also work where
the repository is looked at. On the site they lead to pages, which are made here.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent

# Files of the repository, and what they are on the site.
PAGES = {
    "examples/README.md": "examples.md",
    "benchmarks/README.md": "benchmarks.md",
    "CHANGELOG.md": "changelog.md",
    **{f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted((ROOT / "examples").glob("*.py"))},
}
SOURCES = {page: source for source, page in PAGES.items()}
LINK = re.compile(r"(?<=\]\()([^)#:]+)(?=[)#])")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are files elsewhere in the repository."""
    for source, page in PAGES.items():
        text = (ROOT / source).read_text()
        if source.endswith(".py"):
            text = f"# {Path(source).name}\n\n```python\n{text}```\n"
        added = File.generated(config, page, content=text)
        if source.endswith(".py"):
            added.inclusion = added.inclusion.NOT_IN_NAV
        files.append(added)
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Have links to files of the repository lead to their pages."""
    place = page.file.src_uri
    source = SOURCES.get(place, f"docs/{place}")

    def lead(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), link[1]))
        found = PAGES.get(target, target.removeprefix("docs/"))
        return posixpath.relpath(found, posixpath.dirname(place) or ".")

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)  # no links in code
    return "".join(part if part.startswith("```") else LINK.sub(lead, part) for part in parts)
