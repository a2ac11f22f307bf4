"""The figures of `ssl-report`, of one comparison."""

import io
import warnings
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from PIL import Image

from ssl_runner.report.comparisons import Comparison
from ssl_runner.report.figures.curves import curves
from ssl_runner.report.figures.heat import heat
from ssl_runner.report.figures.measures import measures, spectra
from ssl_runner.report.figures.options import by_option
from ssl_runner.report.figures.style import DPI, STYLE, Picture

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
    """The figure as png and svg. Each is drawn once, and the layout computed once: `savefig` draws twice."""
    figure, png, svg = picture.figure, io.BytesIO(), io.BytesIO()
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())).save(png, "png", dpi=(DPI, DPI))
    figure.set_layout_engine("none")
    metadata: Any = dict.fromkeys(["Creator", "Date", "Format", "Type"])
    FigureCanvasSVG(figure).print_svg(svg, metadata=metadata)
    return {"png": png.getvalue(), "svg": svg.getvalue()}
