"""Sphinx settings: sphinx-build -W docs docs/_build"""

from kdpp import __version__

project = "kdpp"
author = "The kdpp authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "literal"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
exclude_patterns = ["_build", "solver_table.md"]
html_theme = "furo"
html_title = "kdpp"
