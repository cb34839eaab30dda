"""Hooks of mkdocs for links that lead out of docs/, which a reader on GitHub can follow.

Pictures of bench/results become a part of the site. Of a link to any other file the text is left.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

RESULTS = Path(__file__).resolve().parents[2] / "bench" / "results"
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./[^)]*\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every picture, under the path that pages know: ../bench/results/NAME.png."""
    for path in sorted(RESULTS.glob("*.png")):
        uri = f"../bench/results/{path.name}"
        included = InclusionLevel.INCLUDED  # else the dots of the path hide it
        picture = File.generated(config, uri, abs_src_path=str(path), inclusion=included)
        picture.dest_uri = uri.removeprefix("../")
        files.append(picture)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return a page at the top of docs/ without its links to files outside."""
    return markdown if "/" in page.file.src_uri else LINK.sub(r"\1", markdown)
