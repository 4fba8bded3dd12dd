"""Plot the samples of the soaks, which --figures has written. Arguments: that file, the picture. Needs matplotlib."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot

COLUMNS = {1: ("descriptors", 1), 2: ("private memory, MB", 1e6), 3: ("shared memory, MB", 1e6)}
UNITS = {"pool": "tasks", "queue": "messages", "memory": "buffers"}


def main() -> None:
    figures = json.loads(Path(sys.argv[1]).read_text())["figures"]
    matplotlib.rcParams.update({"svg.hashsalt": "mpmemory", "font.size": 8})
    _, rows = pyplot.subplots(len(UNITS), len(COLUMNS), figsize=(9, 5), layout="constrained")
    for row, (what, unit) in zip(rows, UNITS.items(), strict=True):
        samples = figures[f"samples: {what}"]
        for axes, (column, (label, scale)) in zip(row, COLUMNS.items(), strict=True):
            axes.plot([sample[0] for sample in samples], [sample[column] / scale for sample in samples])
            axes.set_ylim(bottom=0)
            axes.set_xlabel(unit)
            axes.set_title(label)
    pyplot.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
