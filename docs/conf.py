"""How Sphinx builds the site: `make docs`."""

import re

import simqat_jax

project = "simqat_jax"
author = "the contributors to simqat_jax"
version = release = simqat_jax.__version__

# Sources are the repository's: links between pages, notebooks and READMEs hold
# there and in the site.
root_doc = "docs/index"
include_patterns = [
    "docs/**",
    "notebooks/**",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "experiments/README.md",
]
exclude_patterns = [".*", "docs/_*", "runs", "simqat_jax", "site", "tests"]

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
nb_execution_mode = "off"  # notebooks hold their outputs
nb_merge_streams = True

# Docstrings: Google's sections, and code in single backticks.
default_role = "code"
napoleon_custom_sections = ["Source"]
autodoc_default_options = {"members": True, "member-order": "bysource"}
toc_object_entries_show_parents = "hide"
python_maximum_signature_line_length = 80
nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!simqat_jax\.).*"),  # what other packages document
    (r"py:.*", r"simqat_jax(\.\w+){2,}"),  # what is not public
]

html_theme = "sphinx_book_theme"
html_title = "simqat_jax"
html_theme_options = {"use_download_button": False, "navbar_persistent": []}
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_extra_path = ["_root"]  # from the address of the site to its first page

linkcheck_timeout = 20


def legible(app, what, name, obj, options, signature, returned):
    """Return a signature with defaults that Sphinx can read."""
    del app, what, name, obj, options
    if signature is not None:
        signature = re.sub(r"<(\S+), of weights \S+>", r"\1", signature)
        signature = re.sub(r"<\S+ object>", "...", signature)
    return signature, returned


def setup(app):
    """Connect what Sphinx calls."""
    app.connect("autodoc-process-signature", legible)
