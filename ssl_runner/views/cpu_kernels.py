"""Fused CPU kernels for views: all operations on one row at a time, so that the row stays in a core's cache.

The kernels are compiled by numba and run on all of torch's threads. They compute the same as
`Policy.__call__`, which applies the operations one by one to the whole batch: with the same random parameters
the results are equal up to rounding. An image is (C, h, w) with C 3 or 1. A tile is (r, g, b): STRETCH pixels
of its channels, flat; if C is 1, all three are the same array.
"""

import math
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from numba.core import event
from torch import Tensor

from ssl_runner import distributed
from ssl_runner.views.color import GRAY
from ssl_runner.views.sampler import ViewIndex

# numba's on-disk cache tracks changes of this file only: clear it if GRAY in color.py changes
RED, GREEN, BLUE = (np.float32(weight) for weight in GRAY)
ZERO, HALF, ONE, TWO, UNIT = (np.float32(number) for number in (0, 0.5, 1, 2, 1 / 255))
BYTE = np.int32(255)
MIN_ROWS, CHUNKS_PER_THREAD = 16, 4  # load balancing: threads differ in speed
STRETCH = 1024  # pixels per tile of the colour operations: three channels of it fit in the L1 cache


class KernelArgs(NamedTuple):
    """Arguments of the kernels as arrays: inputs and outputs of B views, parameters of R sampled rows.

    Parameters of operations that the policy does not have are arrays of length 0.
    """

    images: Any  # (n, C, H, W) uint8
    image_index: Any  # (B,) index into images of each view
    X: Any  # (N, C, h, w) float32, output
    row_index: Any  # (B,) row of X of each view
    param_index: Any  # (B,) index into the R sampled rows of each view
    mean: Any  # (C,)
    std: Any  # (C,)
    boxes: Any  # (R, 4) top, left, height, width
    flip: Any  # (R,) bool
    matrices: Any  # (R, 2, 3)
    blends: Any  # (R, 3, 3), see `color.blend_weights`
    hues: Any  # (R, 4, 3), see `color.hue_weights`
    hue_position: Any  # (R,) position of the hue among the jitter operations, or 4 without jitter
    grayscale: Any  # (R,) bool
    blur: Any  # (R,) bool
    sigma: Any  # (R,) in pixels of the view
    kernel: int  # side of the blur kernel in pixels of the view, 1 without blur
    solarize: Any  # (R,) bool
    threshold: Any  # of solarize


FIELDS = {
    "boxes": (np.float32, 2), "flip": (np.bool_, 1), "matrices": (np.float32, 3),
    "blends": (np.float32, 3), "hues": (np.float32, 3), "hue_position": (np.int64, 1),
    "grayscale": (np.bool_, 1), "blur": (np.bool_, 1), "sigma": (np.float32, 1), "solarize": (np.bool_, 1),
}  # fmt: skip


def make_views(
    images: Tensor,
    X: Tensor,
    index: ViewIndex,
    params: Mapping[str, Tensor],
    mean: Tensor,
    std: Tensor,
    kernel: int,
    threshold: float,
) -> None:
    """Compute B views of images (n, C, H, W) uint8 and write them into X (N, C, h, w) float32.

    params     sampled parameters of a policy by name; FIELDS lists names, types and dimensions
    mean, std  (C,) per-channel statistics in [0, 1]
    kernel     side of the blur kernel in pixels of the view: less than twice that of the view, 1 without blur
    threshold  of solarize, in [0, 1]

    Indices are not checked.
    """
    arrays = {
        name: params[name].contiguous().numpy() if name in params else np.empty((0,) * dimensions, kind)
        for name, (kind, dimensions) in FIELDS.items()
    }
    args = KernelArgs(
        images=images.contiguous().numpy(),
        X=X.numpy(),
        image_index=index.image.numpy(),
        row_index=index.row.numpy(),
        param_index=index.param.numpy(),
        mean=mean.numpy(),
        std=std.numpy(),
        kernel=kernel,
        threshold=np.float32(threshold),
        **arrays,
    )
    views, number = len(index.row), torch.get_num_threads()
    if number == 1:
        compute_rows(args, 0, views)
    else:
        starts = range(0, views, max(MIN_ROWS, math.ceil(views / (CHUNKS_PER_THREAD * number))))
        for _ in thread_pool(number).map(partial(compute_rows, args), starts, [*starts[1:], views]):
            pass


@cache
def thread_pool(number: int) -> ThreadPoolExecutor:
    """Return the thread pool of this process with `number` threads. It is created at the first call."""
    return ThreadPoolExecutor(number, "views")


os.register_at_fork(after_in_child=thread_pool.cache_clear)  # threads do not survive a fork


class Notice(event.Listener):
    """Writes a line to standard error before the first of these kernels is compiled."""

    written = False
    cached = True  # between processes

    def on_start(self, event: event.Event) -> None:
        ours = event.data["dispatcher"].py_func.__module__ == __name__
        if ours and not self.written and distributed.is_main_process():
            self.written = True
            how = (
                "for this machine, once" if self.cached else "in every run, since no cache folder is writable"
            )
            todo = "" if self.cached else "; set NUMBA_CACHE_DIR to one that is"
            print(f"view kernels: compiling {how}, about 10 s{todo}", file=sys.stderr, flush=True)

    def on_end(self, event: event.Event) -> None:
        pass


notice = Notice()
event.register("numba:compile", notice)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with numba, lazily at its first call, and cache the result on disk if possible.

    Compiling all kernels takes some seconds, see `Notice`.
    """
    jit = partial(numba.njit, nogil=True, fastmath=True, error_model="numpy")
    try:
        return jit(cache=True)(function)
    except RuntimeError:  # neither the package folder nor the user cache is writable
        notice.cached = False
        return jit()(function)


@compiled
def convert(image, x):  # type: ignore[no-untyped-def]
    """Convert image (C, h, w) uint8 to x (C, h, w) float32 in [0, 1]."""
    C, h, w = x.shape
    for c in range(C):
        for i in range(h):
            for j in range(w):
                x[c, i, j] = image[c, i, j] * UNIT


@compiled
def triangle_filter(first, length, out, flip, total, pixels, weights):  # type: ignore[no-untyped-def]
    """Compute `geometry.triangle_filter` for one row, with weights that sum to `total`.

    Writes indices into pixels and weights into weights, both (K, out). Returns the number of entries along K
    that are used.
    """
    step = length / np.float32(out)
    reach = max(step, ONE)
    K = min(len(pixels), max(2, math.ceil(TWO * step)))
    for k in range(K):
        for j in range(out):
            centre = step * (np.float32(j) + HALF)
            centre = length - centre if flip else centre
            pixel = np.floor(centre - reach + HALF) + np.float32(k)
            inside = clamp(pixel, ZERO, length - ONE)
            weight = max(ZERO, ONE - abs(pixel + HALF - centre) / reach)
            pixels[k, j], weights[k, j] = np.uint32(first + inside), weight if inside == pixel else ZERO
    for j in range(out):
        found = ZERO
        for k in range(K):
            found += weights[k, j]
        for k in range(K):
            weights[k, j] *= total / found
    return K


@compiled
def resample(image, box, flip, buffers, x):  # type: ignore[no-untyped-def]
    """Resize the box of image (C, H, W) uint8 into x (C, h, w) float32 in [0, 1], flipped if `flip`.

    Weighted sums of columns are computed first, for the rows of the image that are in the box, then weighted
    sums of these rows. The channels of a pixel are packed into one int32, so that one lookup reads them all.

    buffers holds work arrays: rows, row_weights (K, h); columns, column_weights, taken (K', w); line (W,);
    strip (C, H, w). rows and columns are unsigned because numba must check the sign of signed indices:
    negative ones count from the end.
    """
    (C, _, W), (_, h, w) = image.shape, x.shape
    top, left, height, width = box
    rows, row_weights, columns, column_weights, taken, line, strip = buffers
    row_taps = triangle_filter(top, height, h, False, ONE, rows, row_weights)
    column_taps = triangle_filter(left, width, w, flip, UNIT, columns, column_weights)
    for i in range(int(height)):
        r = np.uint64(top) + np.uint64(i)
        for j in range(W):
            line[j] = image[0, r, j]
        for c in range(1, C):
            shift = np.int32(8 * c)
            for j in range(W):
                line[j] |= np.int32(image[c, r, j]) << shift
        for k in range(column_taps):
            for j in range(w):
                taken[k, j] = line[columns[k, j]]
        for c in range(C):
            shift = np.int32(8 * c)
            for j in range(w):
                first = np.float32((taken[0, j] >> shift) & BYTE)
                second = np.float32((taken[1, j] >> shift) & BYTE)
                strip[c, r, j] = column_weights[0, j] * first + column_weights[1, j] * second
            for k in range(2, column_taps):
                for j in range(w):
                    strip[c, r, j] += column_weights[k, j] * np.float32((taken[k, j] >> shift) & BYTE)
    for c in range(C):
        for i in range(h):
            a, b, weight_a, weight_b = rows[0, i], rows[1, i], row_weights[0, i], row_weights[1, i]
            for j in range(w):
                x[c, i, j] = weight_a * strip[c, a, j] + weight_b * strip[c, b, j]
            for k in range(2, row_taps):
                a, weight_a = rows[k, i], row_weights[k, i]
                for j in range(w):
                    x[c, i, j] += weight_a * strip[c, a, j]


@compiled
def sample_affine(small, H, W, box, flip, matrix, x):  # type: ignore[no-untyped-def]
    """Apply crop, flip and affine map, as `geometry.resample` does, with bilinear interpolation.

    small (C, h, w) is an image of size (H, W), resized to the size of the output x (C, h, w). box and matrix
    are in pixels of the image before that resize.
    """
    C, h, w = x.shape
    top, left, height, width = box
    for i in range(h):
        down = np.float32(i + 0.5) * height / h + top - np.float32(0.5 * H)
        for j in range(w):
            right = np.float32(j + 0.5) * W / w
            right = (W - right if flip else right) * width / W + left - np.float32(0.5 * W)
            across = (matrix[0, 0] * right + matrix[0, 1] * down + matrix[0, 2]) * w / W + np.float32(
                0.5 * (w - 1)
            )
            along = (matrix[1, 0] * right + matrix[1, 1] * down + matrix[1, 2]) * h / H + np.float32(
                0.5 * (h - 1)
            )
            p, q = math.floor(along), math.floor(across)
            for c in range(C):
                total = ZERO
                for r in range(max(p, 0), min(p + 2, h)):
                    for s in range(max(q, 0), min(q + 2, w)):
                        total += (ONE - abs(along - r)) * (ONE - abs(across - s)) * small[c, r, s]
                x[c, i, j] = total


@compiled
def clamp(x, low, high):  # type: ignore[no-untyped-def]
    return min(max(x, low), high)


@compiled
def luma(r, g, b):  # type: ignore[no-untyped-def]
    return RED * r + GREEN * g + BLUE * b


@compiled
def total_luma(tile, channels):  # type: ignore[no-untyped-def]
    """Return the sum of the luma over all pixels."""
    r, g, b = tile
    total = ZERO
    for p in range(len(r)):
        total += luma(r[p], g[p], b[p]) if channels == 3 else r[p]
    return total


@compiled
def blend(r, g, b, channels, factor, saturation, mean):  # type: ignore[no-untyped-def]
    """Replace x by factor x + (1 - factor) (saturation luma(x) + mean), clamped to [0, 1].

    This is brightness (saturation and mean 0), contrast (saturation 0) or saturation (mean 0, saturation 1).
    Saturation leaves one-channel images unchanged.
    """
    rest = ONE - factor
    if channels == 3:
        for p in range(len(r)):
            reference = rest * (saturation * luma(r[p], g[p], b[p]) + mean)
            r[p] = clamp(factor * r[p] + reference, ZERO, ONE)
            g[p] = clamp(factor * g[p] + reference, ZERO, ONE)
            b[p] = clamp(factor * b[p] + reference, ZERO, ONE)
    elif saturation == 0:
        for p in range(len(r)):
            r[p] = clamp(factor * r[p] + rest * mean, ZERO, ONE)


@compiled
def mix_channels(red, green, blue, weights):  # type: ignore[no-untyped-def]
    """Compute `color.mix_channels` in place."""
    weights_r, weights_g, weights_b, weights_sum = weights
    for p in range(len(red)):
        r, g, b = red[p], green[p], blue[p]
        high, low = max(max(r, g), b), min(min(r, g), b)
        both = high + low
        red[p] = clamp(
            weights_r[0] * r + weights_g[0] * g + weights_b[0] * b + weights_sum[0] * both, low, high
        )
        green[p] = clamp(
            weights_r[1] * r + weights_g[1] * g + weights_b[1] * b + weights_sum[1] * both, low, high
        )
        blue[p] = clamp(
            weights_r[2] * r + weights_g[2] * g + weights_b[2] * b + weights_sum[2] * both, low, high
        )


@compiled
def jitter(tile, channels, args, n, mean, first, last):  # type: ignore[no-untyped-def]
    """Apply jitter steps first to last - 1 of sampled row n, in place.

    The odd ones of the seven steps 0 to 6 are the three blends, the even ones the four possible positions of
    the hue. `mean` is the mean luma for contrast; it is unused if contrast is not among the steps.
    """
    r, g, b = tile
    for step in range(first, last):
        k = step // 2
        if step % 2:
            factor, contrast, saturation = args.blends[n, k]
            blend(r, g, b, channels, factor, saturation, contrast * mean)
        elif len(args.hues) and channels == 3 and args.hue_position[n] == k:
            mix_channels(r, g, b, args.hues[n])


@compiled
def to_grayscale(tile):  # type: ignore[no-untyped-def]
    """Convert to grayscale in place."""
    r, g, b = tile
    for p in range(len(r)):
        gray = luma(r[p], g[p], b[p])
        r[p] = gray
        g[p] = gray
        b[p] = gray


@compiled
def solarize_and_normalize(x, invert, threshold, mean, std):  # type: ignore[no-untyped-def]
    """Solarize one channel x if `invert`, then normalise it, in place."""
    scale = ONE / std
    if invert:
        for p in range(len(x)):
            x[p] = ONE - x[p] if x[p] >= threshold else x[p]
    for p in range(len(x)):
        x[p] = (x[p] - mean) * scale


@compiled
def copy(source, to):  # type: ignore[no-untyped-def]
    for j in range(len(source)):
        to[j] = source[j]


@compiled
def convolve(x, weights, step, out):  # type: ignore[no-untyped-def]
    """Compute out_p = sum_t weights_|t| x_(p + (half + t) step), with t from -half to half.

    Each pass over the pixels adds two pairs of taps, +-t and +-(t + 1).
    """
    half = len(weights) - 2  # the last weight is 0: it pads an odd number of pairs
    length = len(x) - 2 * half * step
    for t in range(1, half + 1, 2):
        s = min(t + 1, half)
        a, b, weight_ab = x[(half - t) * step :], x[(half + t) * step :], weights[t]
        c, d, weight_cd = x[(half - s) * step :], x[(half + s) * step :], weights[t + 1]
        if t == 1:
            centre, weight_centre = x[half * step :], weights[0]
            for p in range(length):
                out[p] = weight_centre * centre[p] + weight_ab * (a[p] + b[p]) + weight_cd * (c[p] + d[p])
        else:
            for p in range(length):
                out[p] += weight_ab * (a[p] + b[p]) + weight_cd * (c[p] + d[p])


@compiled
def blur(x, sigma, kernel, padded, buffer):  # type: ignore[no-untyped-def]
    """Apply a Gaussian blur with mirrored edges to x (C, h, w) in place.

    padded and buffer are flat work arrays for one channel with its mirrored edges.
    """
    C, h, w = x.shape
    half = kernel // 2
    side = w + 2 * half
    weights = np.zeros(half + 2, np.float32)
    for t in range(half + 1):
        weights[t] = math.exp(-np.float32(t * t) / (TWO * sigma * sigma))
    weights /= TWO * weights.sum() - weights[0]
    for c in range(C):
        plane = x[c].reshape(h * w)
        copy(plane, padded[half * w :])
        for t in range(half):
            copy(x[c, half - t], padded[t * w :])
            copy(x[c, h - 2 - t], padded[(half + h + t) * w :])
        convolve(padded[: (h + 2 * half) * w], weights, w, plane)
        for i in range(h):
            to = buffer[i * side : (i + 1) * side]
            copy(x[c, i], to[half:])
            for t in range(half):
                to[t] = to[2 * half - t]
                to[side - 1 - t] = to[side - 1 - 2 * half + t]
        convolve(buffer[: h * side], weights, 1, padded)
        for i in range(h):
            copy(padded[i * side : i * side + w], x[c, i])


@compiled
def tile_at(flat, p):  # type: ignore[no-untyped-def]
    """Return the tile of flat (C, h w) that starts at pixel p."""
    C, stop = len(flat), p + STRETCH
    return flat[0][p:stop], flat[C // 2][p:stop], flat[C - 1][p:stop]


@compiled
def apply_color_and_blur(x, args, n, padded, buffer):  # type: ignore[no-untyped-def]
    """Apply all operations after the resampling to x (C, h, w) in place.

    n is the index of the sampled parameters; padded and buffer are the work arrays of `blur`.
    """
    C, h, w = x.shape
    flat, pixels, mean, before, steps = x.reshape(C, h * w), h * w, ZERO, 0, 0
    gray = len(args.grayscale) > 0 and C == 3 and args.grayscale[n]
    blurred = args.kernel > 1 and args.blur[n]
    invert = len(args.solarize) > 0 and args.solarize[n]
    if len(args.hue_position) and args.hue_position[n] < 4:
        # contrast needs the mean luma after the steps before it
        before, steps = 1 + 2 * np.argmax(args.blends[n, :, 1]), 7
        for p in range(0, pixels, STRETCH):
            tile = tile_at(flat, p)
            jitter(tile, C, args, n, ZERO, 0, before)
            mean += total_luma(tile, C)
        mean /= np.float32(pixels)
    for p in range(0, pixels, STRETCH):
        tile = tile_at(flat, p)
        jitter(tile, C, args, n, mean, before, steps)
        if gray:
            to_grayscale(tile)
        if not blurred:
            for c in range(C):
                solarize_and_normalize(
                    flat[c][p : p + STRETCH], invert, args.threshold, args.mean[c], args.std[c]
                )
    if blurred:
        blur(x, args.sigma[n], args.kernel, padded, buffer)
        for c in range(C):
            solarize_and_normalize(flat[c], invert, args.threshold, args.mean[c], args.std[c])


@compiled
def compute_rows(args, start, stop):  # type: ignore[no-untyped-def]
    """Compute the views start to stop - 1."""
    C, H, W = args.images.shape[1:]
    h, w = args.X.shape[2:]
    whole = np.array([0, 0, H, W], np.float32)
    across, down = max(2, math.ceil(2 * W / w)), max(2, math.ceil(2 * H / h))  # maximum numbers of taps
    rows, row_weights = np.empty((down, h), np.uint32), np.empty((down, h), np.float32)
    columns, column_weights = np.empty((across, w), np.uint32), np.empty((across, w), np.float32)
    taken, line = np.empty((across, w), np.int32), np.empty(W, np.int32)
    strip, small = np.empty((C, H, w), np.float32), np.empty((C, h, w), np.float32)
    buffers = (rows, row_weights, columns, column_weights, taken, line, strip)
    padded = np.empty((h + args.kernel) * (w + args.kernel), np.float32)
    buffer = np.empty(h * (w + args.kernel), np.float32)
    for b in range(start, stop):
        image, x, n = args.images[args.image_index[b]], args.X[args.row_index[b]], args.param_index[b]
        affine = len(args.matrices) > 0
        cropped = not affine and len(args.boxes) > 0
        box, flip = args.boxes[n] if cropped else whole, cropped and args.flip[n]
        to = small if affine else x
        if (h, w) == (H, W) and not cropped:
            convert(image, to)
        else:
            resample(image, box, flip, buffers, to)
        if affine:
            sample_affine(small, H, W, args.boxes[n], args.flip[n], args.matrices[n], x)
        apply_color_and_blur(x, args, n, padded, buffer)
