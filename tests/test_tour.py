"""docs/tour.ipynb runs from top to bottom, and its results are those that it shows."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest

NOTEBOOK = Path(__file__).parent.parent / "docs" / "tour.ipynb"
CELLS = json.loads(NOTEBOOK.read_text("utf-8"))["cells"]
NUMBER = r"-?\d+\.?\d*"


def execute(source: str, names: dict[str, Any]) -> Any:
    """Execute a cell. Returns the value of its last line if this is an expression that a notebook shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, NOTEBOOK.name, "exec"), names)
    return last and eval(compile(ast.Expression(last.value), NOTEBOOK.name, "eval"), names)


def shown(cell: dict[str, Any]) -> str | None:
    """The text of the value that a cell shows."""
    texts = [
        output["data"]["text/plain"]
        for output in cell["outputs"]
        if output["output_type"] == "execute_result"
    ]
    return "".join(texts[0]) if texts else None


@pytest.mark.slow
def test_cells_of_the_tour_give_the_outputs_that_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    names: dict[str, Any] = {}
    compared = 0
    for cell in (cell for cell in CELLS if cell["cell_type"] == "code"):
        value, expected = execute("".join(cell["source"]), names), shown(cell)
        if expected is not None:
            compared += 1
            found = repr(value)
            assert re.sub(NUMBER, "", found).split() == re.sub(NUMBER, "", expected).split()
            numbers = [np.array(re.findall(NUMBER, text), float) for text in (found, expected)]
            np.testing.assert_allclose(*numbers, rtol=0.1, atol=0.05)  # of other versions and processors
    assert compared == 4
    top1 = names["test"].query("probe == 'linear'").set_index("features").top1
    assert top1["backbone"] > top1["pixels"] > top1["random_init"]
    assert names["table"].loss_gap.min() > 0
    assert len(names["plt"].get_fignums()) == 2
    names["plt"].close("all")
    assert names["features"].shape == (1, 256)


def test_outputs_of_the_tour_are_stored_and_small() -> None:
    assert NOTEBOOK.stat().st_size < 300_000
    assert len(CELLS) <= 15
    images = [out for cell in CELLS for out in cell.get("outputs", []) if "image/png" in out.get("data", {})]
    assert len(images) == 2
    for cell in CELLS:
        assert cell["cell_type"] == "markdown" or cell["execution_count"]
        assert not any(output["output_type"] == "error" for output in cell.get("outputs", []))
