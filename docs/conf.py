"""Sphinx's configuration. ``sphinx-build -W docs build/docs`` builds the site, strictly and without a network.

Tables between ``<!-- name -->`` and ``<!-- /name -->`` are drawn from benchmarks/results as a page is read. The pages
on ops, the changelog and the like are the repository's own files, included.
"""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import docs_tables  # noqa: E402
from sphinx.application import Sphinx  # noqa: E402

from cxv_kernels import __version__  # noqa: E402

project, author = "cxv", "the cxv authors"
version = release = __version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["**/README.md"]
html_theme = "furo"
html_title = f"cxv {version}"
html_show_sphinx = html_show_copyright = False
html_copy_source = False
html_static_path, html_css_files = ["_static"], ["tables.css"]
pygments_style, pygments_dark_style = "friendly", "monokai"

myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
nb_merge_streams = True
nb_execution_mode, nb_execution_timeout = "off", 300  # -D nb_execution_mode=force shows what it prints

autodoc_typehints = "signature"
autodoc_member_order = "bysource"  # of a module the order of __all__
python_maximum_signature_line_length = 100


def draw_tables(app: Sphinx, docname: str, source: list[str]) -> None:
    """Draw the tables from the CSV files."""
    source[0] = docs_tables.redrawn(source[0])


def point_to_pages(app: Sphinx, path: Path, docname: str, content: list[str]) -> None:
    """An op's README links to another's; here they are pages side by side."""
    content[0] = re.sub(r"\]\(\.\./(\w+)/README\.md\)", r"](\1.md)", content[0])


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("source-read", draw_tables)
    app.connect("include-read", point_to_pages)
