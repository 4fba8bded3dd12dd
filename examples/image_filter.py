"""Compute a picture and filter it, in bands of rows: workers share the picture, and see beyond their band.

    python examples/image_filter.py [--output FILE.png] [--size WIDTHxHEIGHT] [--workers N]
                                    [--start-method {fork,forkserver,spawn}]

The picture is a piece of the Mandelbrot set. It and the result are NumPy arrays in shared memory, and each task
gets both, whole: they travel by reference. First, workers write their rows of the picture. Then they blur it,
draw its edges, and let it glow: they read their rows with those around them, which others have written, and
write their rows of the result. All is compared with what one process makes, and with filtering the picture in
one piece. The picture is kept only if --output says where.
"""

import argparse
import itertools
import os
import re
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mpmemory as mp

try:
    from mpmemory import arrays
except ImportError as error:
    raise SystemExit(str(error)) from None

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.float32]  # rows, columns, and red, green and blue from 0 to 1
Pixels = NDArray[np.uint8]  # the same from 0 to 255
Bands = list[tuple[int, int]]  # rows: from the one up to the other
Starmap = Callable[[Callable[..., None], Iterable[tuple[Any, ...]]], object]

# The piece of the set: its middle, its width, and when to take a point for one of the set.
CENTRE_X, CENTRE_Y = -0.7436438, 0.1318259
SPAN = 0.0005
MAX_STEPS = 800

# Where in the circle of colours (0 to 1) is which one.
STOPS = (0.0, 0.16, 0.42, 0.6425, 0.8575, 1.0)
COLOURS = ((0, 7, 100), (32, 107, 203), (237, 255, 255), (255, 170, 0), (0, 2, 0), (0, 7, 100))

FINE, SOFT = 1, 6  # how far the two blurs look
HALO = max(FINE + 1, SOFT)  # how many rows around its own a band needs: edges look one further than the fine blur

RENDER_ROWS = 16  # in a band. Some take much longer than others, so that many small ones are shared out best.
FILTER_ROWS = 64  # All take the same time, and each has to blur its halo too.

MIN_SIDE = 16
MAX_PIXELS = 3840 * 2160
MAX_WORKERS = 64
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def cut(height: int, rows: int) -> Bands:
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


# --- what workers do ------------------------------------------------------------------------------


def render(picture: Picture, top: int, bottom: int) -> None:
    """Write the rows from `top` to `bottom` of the Mandelbrot set into `picture`."""
    height, width, _ = picture.shape
    scale = SPAN / width
    a = np.tile(CENTRE_X + (np.arange(width) - width / 2) * scale, bottom - top)
    b = np.repeat(CENTRE_Y + (np.arange(top, bottom) - height / 2) * scale, width)
    x, y = np.zeros_like(a), np.zeros_like(b)
    where = np.arange(a.size)  # the points that have not escaped yet; all arrays are of these only
    escape = np.full(a.size, np.nan)
    for step in range(MAX_STEPS):
        if not where.size:
            break
        xx, yy = x * x, y * y
        out = xx + yy > 1e4
        if out.any():
            # By how far it went beyond, the step at which a point escapes becomes a smooth number.
            escape[where[out]] = step - np.log2(np.log((xx + yy)[out]) / 2)
            x, y, xx, yy, a, b, where = (values[~out] for values in (x, y, xx, yy, a, b, where))
        y = 2 * x * y + b
        x = xx - yy + a

    inside = np.isnan(escape)
    shade = np.sqrt(np.where(inside, 0, escape.clip(min=0))) * 0.1 + 0.08
    shade %= 1
    for channel in range(3):
        levels = [colour[channel] / 255 for colour in COLOURS]
        band = np.interp(shade, STOPS, levels)
        band[inside] = 0
        picture[top:bottom, :, channel] = band.reshape(bottom - top, width)


def filter_band(picture: Picture, result: Pixels, top: int, bottom: int) -> None:
    """Write the filtered rows from `top` to `bottom` of `picture` into `result`."""
    first, last = max(top - HALO, 0), min(bottom + HALO, len(picture))
    band = picture[first:last]
    fine = blur(band, FINE)
    lit = fine * (1 - 1.2 * edges(fine)).clip(0, 1)[:, :, np.newaxis]
    glowing = 1 - (1 - lit) * (1 - 0.35 * blur(band, SOFT))
    result[top:bottom] = (glowing[top - first : bottom - first] * 255 + 0.5).clip(0, 255)


def blur(picture: Picture, radius: int) -> Picture:
    """Return `picture` with each pixel mixed with those around it: a Gaussian blur."""
    weights = np.exp(-2 * (np.arange(-radius, radius + 1) / radius) ** 2)
    shares = (weights / weights.sum()).tolist()  # Python's floats: float32 times these is float32
    for axis in (0, 1):
        length = picture.shape[axis]
        padded = np.pad(picture, [(radius, radius) if i == axis else (0, 0) for i in range(3)], mode="edge")
        mixed = np.zeros_like(picture)
        for i, share in enumerate(shares):
            mixed += share * (padded[i : i + length] if axis == 0 else padded[:, i : i + length])
        picture = mixed
    return picture


def edges(picture: Picture) -> Picture:
    """Return how steeply the brightness changes at each pixel."""
    grey = 0.3 * picture[:, :, 0] + 0.59 * picture[:, :, 1] + 0.11 * picture[:, :, 2]
    padded = np.pad(grey, 1, mode="edge")
    dx = padded[1:-1, 2:] - padded[1:-1, :-2]
    dy = padded[2:, 1:-1] - padded[:-2, 1:-1]
    steepness: Picture = np.sqrt(dx * dx + dy * dy)
    return steepness


# --- what the program does with them --------------------------------------------------------------


def run_here(work: Callable[..., None], tasks: Iterable[tuple[Any, ...]]) -> None:
    for _ in itertools.starmap(work, tasks):
        pass


def make(picture: Picture, result: Pixels, starmap: Starmap) -> tuple[float, float]:
    """Render the picture and then filter it; `starmap` does the tasks. Return the seconds of both."""
    height = len(picture)
    start = time.perf_counter()
    starmap(render, [(picture, *band) for band in cut(height, RENDER_ROWS)])
    rendered = time.perf_counter()
    # All bands are there now, so that the rows around each are.
    starmap(filter_band, [(picture, result, *band) for band in cut(height, FILTER_ROWS)])
    return rendered - start, time.perf_counter() - rendered


def check(what: str, found: NDArray[Any], expected: NDArray[Any]) -> None:
    differ = np.argwhere(found != expected)
    if len(differ):
        row, column, _ = differ[0]
        raise SystemExit(
            f"{what}: expected {expected[row, column]} at row {row}, column {column}, found {found[row, column]}; "
            f"{len(differ):,} values differ"
        )


def write_png(path: Path, pixels: Pixels) -> None:
    height, width, _ = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)  # 8 bits of red, green and blue each
    lines = np.zeros((height, 1 + 3 * width), np.uint8)  # each line begins with its filter: 0, none
    lines[:, 1:] = pixels.reshape(height, 3 * width)
    with path.open("wb") as file:
        file.write(PNG_SIGNATURE)
        for kind, data in ((b"IHDR", header), (b"IDAT", zlib.compress(lines.tobytes())), (b"IEND", b"")):
            file.write(struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)))


def read_png_size(path: Path) -> tuple[int, int]:
    """Return width and height of the picture in a file."""
    with path.open("rb") as file:
        start = file.read(24)
    if start[:16] != PNG_SIGNATURE + b"\0\0\0\x0dIHDR":
        raise SystemExit(f"{path}: expected a PNG file, found {start!r}")
    width, height = struct.unpack(">II", start[16:])
    return width, height


def save(path: Path, pixels: Pixels) -> None:
    """Write the picture, and look whether the file is right."""
    write_png(path, pixels)
    height, width, _ = pixels.shape
    if read_png_size(path) != (width, height):
        raise SystemExit(f"{path}: expected a picture of {(width, height)}, found {read_png_size(path)}")


# --- the command line -----------------------------------------------------------------------------


def size_of_picture(text: str) -> tuple[int, int]:
    match = re.fullmatch("([0-9]{1,9})x([0-9]{1,9})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT, as in 900x600, found {text!r}")
    width, height = int(match[1]), int(match[2])
    if min(width, height) < MIN_SIDE:
        raise argparse.ArgumentTypeError(f"expected {MIN_SIDE}x{MIN_SIDE} or more, found {text!r}")
    if width * height > MAX_PIXELS:
        raise argparse.ArgumentTypeError(f"expected {MAX_PIXELS:,} pixels at most, found {width * height:,}")
    return width, height


def number_of_workers(text: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MAX_WORKERS:
        raise argparse.ArgumentTypeError(f"expected a number from 1 to {MAX_WORKERS}, found {text!r}")
    return int(text)


def output_file(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"expected a name that ends in .png, found {text!r}")
    if os.path.isdir(path):  # unlike Path.is_dir, this raises nothing, whatever the name is
        raise argparse.ArgumentTypeError(f"expected a file, found the folder {text!r}")
    if not os.path.isdir(path.parent):
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description="Compute a picture and filter it, in several processes.")
    parser.add_argument("--output", type=output_file, metavar="FILE.png", help="keep the picture there")
    parser.add_argument(
        "--size",
        type=size_of_picture,
        default=(900, 600),
        metavar="WIDTHxHEIGHT",
        help="of the picture (default: 900x600, which takes seconds; 3840x2160 takes a minute and 1 GB)",
    )
    parser.add_argument("--workers", type=number_of_workers, default=min(os.cpu_count() or 1, 8), metavar="N")
    parser.add_argument("--start-method", choices=mp.get_all_start_methods(), default=mp.get_start_method())
    args = parser.parse_args()
    ctx = mp.get_context(args.start_method)
    width, height = args.size
    print(f"The Mandelbrot set, {width} x {height}. Workers: {args.workers}, by {args.start_method}.")

    expected_picture = np.zeros((height, width, 3), np.float32)
    expected = np.zeros((height, width, 3), np.uint8)
    # In the same bands, which suit the cache of a processor: a whole picture takes longer.
    rendering, filtering = make(expected_picture, expected, run_here)
    one = rendering + filtering
    print(f"In one process: {one:.2f} s (rendering {rendering:.2f}, filtering {filtering:.2f})")

    picture = arrays.zeros((height, width, 3), np.float32)
    result = arrays.zeros((height, width, 3), np.uint8)
    start = time.perf_counter()
    with ctx.Pool(args.workers) as pool:
        rendering, filtering = make(picture, result, lambda work, tasks: pool.starmap(work, tasks, chunksize=1))
    several = time.perf_counter() - start
    other = several - rendering - filtering
    print(
        f"In a pool: {several:.2f} s (rendering {rendering:.2f}, filtering {filtering:.2f}, "
        f"starting and ending it {other:.2f})"
    )
    print(f"Speed-up: {one / several:.2f} ({os.cpu_count()} processors)")
    check("picture", picture, expected_picture)
    check("result", result, expected)
    # That bands see enough of what is around them is not known yet: both ways use them.
    whole = np.zeros_like(expected)
    filter_band(picture, whole, 0, height)
    check("bands", expected, whole)

    try:
        if args.output is not None:
            save(args.output, result)
            print(f"The picture is in {args.output}.")
        else:
            with tempfile.TemporaryDirectory() as folder:
                save(Path(folder) / "picture.png", result)
            print("To see the picture, add: --output picture.png")
    except OSError as error:
        raise SystemExit(f"cannot save the picture: {error}") from None
    print("OK: the pool and one process make the same picture.")


if __name__ == "__main__":
    main()
