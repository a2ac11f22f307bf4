"""The figures of `ssl-report`, of one comparison."""

import io
import warnings
from typing import Any

import matplotlib

from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.figures.curves import curves
from ssl_runner.report.figures.heat import heat
from ssl_runner.report.figures.measures import measures, spectra
from ssl_runner.report.figures.options import by_option
from ssl_runner.report.figures.style import STYLE, Picture

FIGURES = {
    "keys": by_option,
    "heat": heat,
    "measures": measures,
    "spectra": spectra,
    "curves": curves,
}


def draw(part: Comparison) -> dict[str, tuple[Picture, dict[str, bytes]]]:
    """Name -> figure with notes, and its content as svg and png, of each figure that has data."""
    drawn = {}
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # values in letters that the font lacks
        for name, make in FIGURES.items():
            if picture := make(part):
                drawn[name] = picture, saved(picture)
    return drawn


def saved(picture: Picture) -> dict[str, bytes]:
    """The figure as png and svg. The layout is computed once, since it takes most of the time."""
    png, svg = io.BytesIO(), io.BytesIO()
    picture.figure.savefig(png, format="png")
    picture.figure.set_layout_engine("none")
    metadata: Any = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    picture.figure.savefig(svg, format="svg", metadata=metadata)
    return {"png": png.getvalue(), "svg": svg.getvalue()}
