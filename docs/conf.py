"""The site: make docs builds it into out/docs, without network and with warnings as errors."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parents[1]))  # the checkout, not an installed copy

from attribution import __version__
from evaluation.study.settings import StudySettings, settings_of

project = "vision-attribution"
author = "The vision-attribution authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["attrs_block"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
toc_object_entries_show_parents = "hide"
napoleon_numpy_docstring = False
napoleon_use_rtype = False

smartquotes_action = "qe"  # no dashes: --option stays as it is

html_theme = "furo"
html_title = "vision-attribution"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_copy_source = False
pygments_style = "default"
pygments_dark_style = "github-dark"


def one_line(entry: Any) -> str:
    """What an entry of a registry is, from its own words."""
    for said in (getattr(entry, "summary", None), getattr(entry, "source", None)):
        if isinstance(said, str):
            return said
    if isinstance(entry, dict):
        return "for " + ", ".join(entry)
    if callable(getattr(entry, "label", None)):
        return str(entry.label())
    function = getattr(entry, "function", entry)
    ours = str(getattr(function, "__module__", "")).split(".")[0] in ("attribution", "evaluation")
    doc = inspect.getdoc(function) if ours and not isinstance(function, type) else None
    return "" if doc is None or doc == inspect.getdoc(type(function)) else " ".join(doc.split("\n\n")[0].split())


def escape_markup(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """``literals`` are the only markup that our docstrings have."""
    for number, line in enumerate(lines):
        parts = line.split("``")
        parts[::2] = [re.sub(r"(?<!\\)([*|@])", r"\\\1", part) for part in parts[::2]]
        lines[number] = "``".join(parts)


def join_sentence(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """Napoleon takes what stands before a colon in a property's sentence for its type."""
    for line in [line for line in lines if what == "property" and line.startswith(":type: ")]:
        lines.remove(line)
        lines[0] = f"{line.removeprefix(':type: ')}: {lines[0]}"


def list_entries(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """A registry is shown as the list of its entries."""
    if what == "data" and isinstance(value, dict):
        entries = {key: one_line(entry) for key, entry in value.items()}
        lines[:] = [line for key, text in entries.items() for line in (f"- ``{key}``: {text}".removesuffix(": "), "")]
        escape_markup(app, what, name, value, options, lines)


def list_settings(app: Sphinx, what: str, name: str, value: Any, options: Any, lines: list[str]) -> None:
    """The settings of a study are listed with the help of their options."""
    if what == "class" and issubclass(value, StudySettings):
        lines += ["", *(f"- ``{key}``: {about.help}" for key, about in settings_of(value).items() if about.help), ""]
        escape_markup(app, what, name, value, options, lines)


def shorten_signature(app: Sphinx, what: str, name: str, value: Any, options: Any, signature: str, returned: str) -> tuple[str, str] | None:
    """Fields of a dataclass as its source has them; a long default is left to the source."""
    if not dataclasses.is_dataclass(value):
        return None
    shown = []
    for field in dataclasses.fields(value):
        default = "..." if field.default_factory is not dataclasses.MISSING else field.default
        text = "" if default is dataclasses.MISSING else f" = {default if default == '...' else repr(default)}"
        shown.append(f"{field.name}: {field.type}" + (text if len(text) < 40 else " = ..."))
    return f"({', '.join(shown)})", returned


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-signature", shorten_signature)
    app.connect("autodoc-process-docstring", escape_markup, priority=400)  # before napoleon, which is at 500
    app.connect("autodoc-process-docstring", join_sentence, priority=600)
    app.connect("autodoc-process-docstring", list_entries, priority=600)
    app.connect("autodoc-process-docstring", list_settings, priority=600)
