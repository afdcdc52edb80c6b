"""Pages of reports: one style, figures as SVG that follow the reader's light or dark mode, files that appear whole."""

from __future__ import annotations

import base64
import io
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape
from PIL import Image

from attribution.figures.style import Figure
from attribution.files import whole_file
from evaluation.study import tables
from evaluation.study.style import DARK_COLOURS, FAMILY_COLOURS, GRID, INK, MUTED, PAPER, figure_style, has_interval

_VARIABLES = {INK: "ink", MUTED: "muted", GRID: "grid", PAPER: "paper"} | {
    colour: family.replace(" ", "-") for family, colour in FAMILY_COLOURS.items()
}
UNKNOWN = "–"  # noqa: RUF001


def page(template: str, **values: Any) -> str:
    """A page that needs no other file, from a template that extends page.html.j2; text in it is escaped."""
    variables = [(name, colour, DARK_COLOURS[colour]) for colour, name in _VARIABLES.items()]
    return _environment().get_template(template).render(variables=variables, **values)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8, completely or not at all."""
    with whole_file(path) as temporary:
        temporary.write_bytes(text.encode("utf-8", "backslashreplace"))  # names of files need not be valid UTF-8


def inline_svg(figure: Figure, prefix: str = "") -> Markup:
    """The figure as an ``svg`` element for a page that sets its colours as variables: light and dark from one drawing.

    Args:
        prefix: put before each id of the figure, so that the ids of several figures on a page differ.
    """
    buffer = io.StringIO()
    with figure_style():
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'<svg [^>]*(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true" focusable="false">', svg, count=1)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(?<= [dxy]=)"[^"]*"|transform="[^"]*"', lambda m: re.sub(r"(\d\d\.\d|\.\d\d)\d+", r"\1", m[0]), svg)
    svg = re.sub(r"\s*\n\s*([MLz]) ?", r"\1", svg)
    names = {name: f"{prefix}{number}" for number, name in enumerate(re.findall(r' id="([^"]*)"', svg))}
    svg = re.sub(r'(?<= id=")[^"]*|(?<= href="#)[^"]*|(?<=url\(#)[^)]*', lambda m: names[m[0]], svg)
    run = re.compile(r'(?:<use ([^>]*?) style="([^"]*)"/>\s*)(?:<use [^>]*? style="\2"/>\s*)+')
    svg = run.sub(lambda m: f'<g style="{m[2]}">' + re.sub(r' style="[^"]*"|\s+(?=<use)', "", m[0]).rstrip() + "</g>", svg)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "system-ui, sans-serif", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name})")
    return Markup(re.sub(r"\n\s*", "\n", svg).strip())


def picture(image: Image.Image) -> dict[str, Any]:
    """The image as a PNG in a data URI. It is reduced to 64 colours if that makes it smaller."""
    few = image.quantize(64, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE) if max(image.size) > 40 else image
    return {"uri": data_uri(few), "width": image.width, "height": image.height, "tiny": max(image.size) < 80}


def data_uri(image: Image.Image, lossless: bool = True) -> str:
    """The image as a data URI: PNG where nothing may be lost, else JPEG."""
    buffer, kind = io.BytesIO(), "png" if lossless else "jpeg"
    image.save(buffer, format=kind, optimize=True, quality=86)  # PNG has no quality
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def image_of(pixels: np.ndarray) -> Image.Image:
    """An image of pixels, float [H, W, 3] in [0, 1]."""
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """A copy whose longer side has at most so many pixels."""
    copy = image.copy()
    copy.thumbnail((side, side), Image.Resampling.LANCZOS)
    return copy


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("evaluation", "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "breakable": lambda name: Markup(re.sub("([/_])", r"\1<wbr>", str(escape(name)))),
        "distinct": lambda values: list(dict.fromkeys(values)),
        "link": lambda name: quote(name, errors="replace"),
        "mean": lambda interval: tables.mean(interval) or UNKNOWN,
        "p_value": lambda p: tables.p_value(p) or UNKNOWN,
        "percent": lambda interval: tables.percent(interval) or UNKNOWN,
        "whole": lambda value: f"{value:,.0f}",
        "words": lambda name: name.replace("_", " "),
    }
    environment.globals |= {"counted": tables.counted, "written": tables.written}
    environment.tests["known"] = has_interval
    return environment
