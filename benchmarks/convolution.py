"""Gradients of a convolution inside a loop, as training runs: JAX's, ours (`models/convolutions.py`), and sums of matrix products.

    python benchmarks/convolution.py --out DIR [--batch 16] [--repeats 3]

GFLOP per second of processor time, the best of interleaved repeats (other work on the machine then matters little); `alone` is the same outside of a
loop. Forms of the kernel gradient besides JAX's and ours: `shifted`, a matrix product for each place of the kernel, and `columns`, one product with
all shifted images side by side.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from forwardgrad.diagnostics import cost
from forwardgrad.losses.products import FEW, turned
from forwardgrad.models.convolutions import convolve
from forwardgrad.models.layers import Window
from forwardgrad.training.metrics import write_json

# side of the image, channels in and out, kernel
SHAPES = {
    "CNN conv0, 28 pixels": (28, 1, 15, Window(5)),
    "CNN conv1, 28 pixels": (24, 15, 40, Window(5)),
    "AlexNet conv0, 32 pixels": (32, 3, 64, Window(5, 1, 2)),
    "AlexNet conv1, 32 pixels": (15, 64, 192, Window(5, 1, 2)),
    "AlexNet conv2, 32 pixels": (7, 192, 384, Window(3, 1, 1)),
    "AlexNet conv4, 32 pixels": (7, 256, 256, Window(3, 1, 1)),
    "64 channels, 16 pixels": (16, 64, 64, Window(3, 1, 1)),
}


def product(x: jax.Array, ct: jax.Array) -> jax.Array:
    """xᵀ ct over all axes but the last, as `losses/products.py` computes the gradient of a kernel."""
    x, ct = x.reshape(-1, x.shape[-1]), ct.reshape(-1, ct.shape[-1])
    return turned(ct.T @ x) if ct.shape[1] <= FEW else turned(x) @ ct


def forms(window: Window, side: int) -> dict[str, Callable]:
    """From (x, kernel, error) to what has the shape of one of them: kernel gradients, input gradients, the convolution."""
    around = [(window.padding, window.padding)] * 2

    def by_jax(x: jax.Array, kernel: jax.Array) -> jax.Array:
        strides = (window.stride, window.stride)
        return jax.lax.conv_general_dilated(x, kernel, strides, around, dimension_numbers=("NHWC", "HWIO", "NHWC"))

    ours = lambda x, kernel: convolve(x, kernel, window.stride, window.padding)

    def shifts(x: jax.Array) -> list[jax.Array]:
        x, last = jnp.pad(x, ((0, 0), *around, (0, 0))), window.stride * (side - 1) + 1
        places = [(i, j) for i in range(window.size) for j in range(window.size)]
        return [x[:, i : i + last : window.stride, j : j + last : window.stride] for i, j in places]

    def shifted(x: jax.Array, kernel: jax.Array, ct: jax.Array) -> jax.Array:
        return jnp.stack([product(part, ct) for part in shifts(x)]).reshape(kernel.shape)

    def columns(x: jax.Array, kernel: jax.Array, ct: jax.Array) -> jax.Array:
        return product(jnp.concatenate(shifts(x), -1), ct).reshape(kernel.shape)

    of_kernel = lambda f: lambda x, kernel, ct: jax.vjp(lambda w: f(x, w), kernel)[1](ct)[0]
    of_input = lambda f: lambda x, kernel, ct: jax.vjp(lambda x: f(x, kernel), x)[1](ct)[0]
    return {
        "kernel: JAX": of_kernel(by_jax),
        "kernel: ours": of_kernel(ours),
        "kernel: shifted": shifted,
        "kernel: columns": columns,
        "input: JAX": of_input(by_jax),
        "input: ours": of_input(ours),
        "forward": lambda x, kernel, ct: ours(x, kernel),
    }


def looped(form: Callable) -> Callable:
    """Once, in a loop whose length XLA does not know."""
    step = lambda i, carry, x, kernel, ct: carry + form(x + i, kernel, ct).sum()
    return lambda n, *given: jax.lax.fori_loop(0, n, lambda i, carry: step(i, carry, *given), jnp.zeros(()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (side, inputs, channels, window) in SHAPES.items():
        (out,) = window.sides(side)
        keys = jax.random.split(jax.random.key(0), 3)
        image, error = (arguments.batch, side, side, inputs), (arguments.batch, out, out, channels)
        shapes = (image, (window.size, window.size, inputs, channels), error)
        given = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
        compiled = {}
        for form, function in forms(window, out).items():
            compiled[form] = jax.jit(looped(function)), (1, *given)
            if form == "kernel: JAX":
                compiled[f"{form}, alone"] = jax.jit(function), given
        times = {form: [] for form in compiled}
        for repeat in range(arguments.repeats + 1):
            for form, (function, values) in compiled.items():
                began = time.process_time()
                jax.block_until_ready(function(*values))
                if repeat:  # the first one compiles
                    times[form].append(time.process_time() - began)
        gflop = 2 * arguments.batch * out**2 * window.size**2 * inputs * channels / 1e9
        rates = {form: gflop / min(taken) for form, taken in times.items()}
        rows.append({"shape": name, "batch": arguments.batch, "gflop": gflop, "rates": rates, "device": cost.device()})
        print(f"{name:26s} " + ", ".join(f"{form} {rate:.1f}" for form, rate in rates.items()), flush=True)
        write_json(arguments.out / "convolution.json", rows)


if __name__ == "__main__":
    main()
