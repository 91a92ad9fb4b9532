"""Sphinx settings: sphinx-build -W docs docs/_build"""

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.transforms.post_transforms import SphinxPostTransform

from kdpp import __version__

project = "kdpp"
author = "The kdpp authors"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
default_role = "py:obj"
autodoc_typehints = "none"
autodoc_member_order = "bysource"
exclude_patterns = ["_build", "presets_table.md", "solver_table.md"]
html_theme = "furo"
html_title = "kdpp"


class LinkedNames(SphinxPostTransform):
    """A name in backticks links to its place in the reference, on every page, if it has one."""

    default_priority = 400

    def run(self, **kwargs: object) -> None:
        objects = self.env.domains["py"].objects
        for literal in list(self.document.findall(nodes.literal)):
            name = literal.astext().partition("(")[0]
            places = (
                name,
                f"kdpp.{name}",
                f"kdpp.solvers.{name}",
                name.replace("kdpp.", "kdpp.solvers."),
            )
            found = next((place for place in places if place in objects), None)
            if found is None or isinstance(literal.parent, nodes.reference | nodes.title):
                continue
            place = objects[found]
            here, builder = self.env.docname, self.app.builder
            uri = builder.get_relative_uri(here, place.docname) + f"#{place.node_id}"
            link = nodes.reference("", "", internal=True, refuri=uri, reftitle=found)
            literal.replace_self(link)
            link += literal


def setup(app: Sphinx) -> None:
    app.add_post_transform(LinkedNames)
