"""The documentation as a site: ``scripts/site``. The pages are those that one reads in the tree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent

project = "secure-fedprompt"
copyright = ""
html_show_copyright = False
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
root_doc = "README"
include_patterns = ["*.md", "docs/**.md", "secure_fedprompt/bundled_clip/*.md"]
myst_heading_anchors = 4
html_theme = "furo"
html_title = "secure-fedprompt"
html_copy_source = False

MODEL = "secure_fedprompt/bundled_clip/README"
CONTENTS = """

```{toctree}
:hidden:
:caption: %s

%s
```
"""
GROUPS = {
    "Use": [
        "deployment",
        "python",
        "flower",
        "protections",
        "methods",
        "auditing",
        "differential-privacy",
    ],
    "Believe": [
        "threat-model",
        "terms",
        "secure-selection",
        "sum-tags",
        "regular-graph",
        "results/privacy",
    ],
    "Measure": ["results/performance", "results/reliability", "results/methods", "regions"],
    "Read and change": ["architecture", "api", "audit-log", "json"],
}


def prepare(app: Any, page: str, source: list[str]) -> None:
    """Links to folders are for readers of the tree; the first page gets the table of contents,
    which they do not need."""

    def linked(found: re.Match[str]) -> str:
        return found[1] if (ROOT / page).parent.joinpath(found[2]).is_dir() else found[0]

    source[0] = re.sub(r"\[([^]]*)\]\(([^)\s#]+)\)", linked, source[0])
    if page == root_doc:
        for caption, names in GROUPS.items():
            source[0] += CONTENTS % (caption, "\n".join(f"docs/{name}" for name in names))
        source[0] += CONTENTS % ("Project", "CONTRIBUTING\nSECURITY\n" + MODEL)


def setup(app: Any) -> None:
    app.connect("source-read", prepare)
