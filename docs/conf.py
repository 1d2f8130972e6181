"""How Sphinx builds the guides and the reference: MyST pages, numpydoc docstrings."""

from __future__ import annotations

import os
import re
from pathlib import Path

from ptqkit._version import __version__

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent

project = "ptqkit"
author = "the authors of ptqkit"
release = version = __version__
html_title = f"ptqkit {release}"
html_theme = "furo"
html_show_copyright = False

extensions = [
    "myst_parser",
    "numpydoc",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.mathjax",
]
templates_path = ["_templates"]
exclude_patterns = ["_build", "_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4

autosummary_generate = True
autosummary_imported_members = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say more than the annotations
numpydoc_show_class_members = False  # the template of classes lists them

#: Pages that lie elsewhere in the repository, by the page of the documentation that shows them.
ELSEWHERE = {
    "benchmarks": "benchmarks/README.md",
    "benchmarks-pretrain": "benchmarks/results/pretrain/README.md",
    "benchmarks-sweeps": "benchmarks/sweeps/README.md",
    "changelog": "CHANGELOG.md",
    "contributing": "CONTRIBUTING.md",
}
PAGES = {ROOT / path: HERE / f"{name}.md" for name, path in ELSEWHERE.items()}
# A link or an image of Markdown, not to a site.
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?![a-z]+:)([^)#]+)(#[^)]*)?\)")


def relink(text: str, home: Path, page: Path) -> str:
    """Return the text of ``home`` with its links as they are valid on ``page``.

    A link to a file that the documentation does not show becomes the name of that file.
    """

    def replace(match: re.Match[str]) -> str:
        image, label, path, anchor = match.groups()
        target = (home.parent / path).resolve()
        target = PAGES.get(target, target)
        if not image and not target.is_relative_to(HERE):
            name = target.relative_to(ROOT).as_posix()
            return label if label.endswith(Path(path).name) else f"{label} (`{name}`)"
        return f"{image}[{label}]({os.path.relpath(target, page.parent)}{anchor or ''})"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.M | re.S)  # every other one is code
    return "".join(p if i % 2 else LINK.sub(replace, p) for i, p in enumerate(parts))


def read_page(app, name: str, content: list[str]) -> None:
    """Show a page that lies elsewhere, and make the links of all pages valid here."""
    page = HERE / f"{name}.md"
    if page.exists():
        home = ROOT / ELSEWHERE[name] if name in ELSEWHERE else page
        content[0] = relink(home.read_text(encoding="utf-8"), home, page)


def setup(app) -> None:
    """Let Sphinx read pages through :func:`read_page`."""
    app.connect("source-read", read_page)
