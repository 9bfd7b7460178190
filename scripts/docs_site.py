"""Hooks of mkdocs: pages from outside of docs/ join the site, and links to source files become names of files.

Pages are written for readers of the repository: they link to the README, to benchmarks and to code by relative paths.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
JOINED = {
    "readme.md": ROOT / "README.md",
    "benchmarks.md": ROOT / "benchmarks" / "README.md",
    "contributing.md": ROOT / "CONTRIBUTING.md",
    "changelog.md": ROOT / "CHANGELOG.md",
}
"""Page of the site → file of the repository."""
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages from outside of docs/. Called by mkdocs."""
    from mkdocs.structure.files import File

    for page, path in JOINED.items():
        if files.get_file_from_path(page) is None:
            files.append(File.generated(config, page, content=path.read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links for the site, code blocks left alone. Called by mkdocs."""
    uri = page.file.src_uri
    source = JOINED[uri] if uri in JOINED else ROOT / "docs" / uri
    parts = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.DOTALL)
    return "".join(part if part.startswith("`") else linked(part, source, uri) for part in parts)


def linked(text: str, source: Path, uri: str) -> str:
    """Text with links as they lead from the page `uri` of the site; `source` is the page's file."""
    pages = {path: page for page, path in JOINED.items()}

    def rewritten(found: re.Match[str]) -> str:
        picture, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        path = (source.parent / target).resolve()
        if path in pages:
            place = pages[path]
        elif path.is_relative_to(ROOT / "docs"):
            place = path.relative_to(ROOT / "docs").as_posix()
        else:
            return words if words.startswith("`") else f"{words} (`{path.relative_to(ROOT).as_posix()}`)"
        return f"{picture}[{words}]({'../' * uri.count('/')}{place}{anchor})"

    return LINK.sub(rewritten, text)
