"""A convolution's kernel gradient: XLA's own against sums of matrix products, forwards and input gradient beside it.

    python benchmarks/convolution.py --out DIR [--repeats 5]

Forms of the kernel gradient, [N, H, W, C] and [N, H', W', K] to [k, k, C, K]: `xla`, the transposed convolution; `shifted`, a matrix product for each
place of the kernel; `rows`, one for each row of it; `columns`, one product with all k² shifts side by side. Seconds are processor time, the least of
interleaved repeats, so that other work on the machine matters little; `in a loop` is a repeat inside `lax.fori_loop`, as training runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp

from forwardgrad.diagnostics import cost
from forwardgrad.losses.products import FEW, turned
from forwardgrad.models.layers import Window
from forwardgrad.training.metrics import write_json

# images a batch, side, channels in and out, then side, stride and padding of the kernel
SHAPES = {
    "CNN conv0, 28 pixels": (64, 28, 1, 15, 5, 1, 0),
    "CNN conv1, 28 pixels": (64, 24, 15, 40, 5, 1, 0),
    "AlexNet conv0, 32 pixels": (64, 32, 3, 64, 5, 1, 2),
    "AlexNet conv1, 32 pixels": (64, 15, 64, 192, 5, 1, 2),
    "AlexNet conv2, 32 pixels": (64, 7, 192, 384, 3, 1, 1),
    "AlexNet conv4, 32 pixels": (64, 7, 256, 256, 3, 1, 1),
    "64 channels, 16 pixels": (64, 16, 64, 64, 3, 1, 1),
    "AlexNet conv0, 224 pixels": (4, 224, 3, 64, 11, 4, 2),
}


def xla(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def product(x: jax.Array, ct: jax.Array) -> jax.Array:
    """xᵀ ct over all axes but the last, as `losses/products.py` computes the gradient of a kernel."""
    x, ct = x.reshape(-1, x.shape[-1]), ct.reshape(-1, ct.shape[-1])
    return turned(ct.T @ x) if ct.shape[1] <= FEW else turned(x) @ ct


def forms(size: int, stride: int, padding: int, side: int) -> dict[str, Callable]:
    last = stride * (side - 1) + 1
    pad = lambda x: jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    across = lambda x: [x[:, :, j : j + last : stride] for j in range(size)]

    def shifts(x: jax.Array) -> Iterator[jax.Array]:
        x = pad(x)
        return (row[:, i : i + last : stride] for i in range(size) for row in across(x))

    def shifted(x: jax.Array, kernel: jax.Array, ct: jax.Array) -> jax.Array:
        return jnp.stack([product(part, ct) for part in shifts(x)]).reshape(kernel.shape)

    def rows(x: jax.Array, kernel: jax.Array, ct: jax.Array) -> jax.Array:
        wide = jnp.concatenate(across(pad(x)), -1)
        parts = [product(wide[:, i : i + last : stride], ct) for i in range(size)]
        return jnp.stack(parts).reshape(kernel.shape)

    def columns(x: jax.Array, kernel: jax.Array, ct: jax.Array) -> jax.Array:
        return product(jnp.concatenate(list(shifts(x)), -1), ct).reshape(kernel.shape)

    return {
        "xla": lambda x, kernel, ct: jax.vjp(lambda w: xla(x, w, stride, padding), kernel)[1](ct)[0],
        "shifted": shifted,
        "rows": rows,
        "columns": columns,
        "forward": lambda x, kernel, ct: xla(x, kernel, stride, padding),
        "input gradient": lambda x, kernel, ct: jax.vjp(lambda x: xla(x, kernel, stride, padding), x)[1](ct)[0],
    }


def looped(form: Callable) -> Callable:
    """Twice in a loop, each time of other numbers."""
    step = lambda i, carry, given: carry + form(given[0] + i, given[1], given[2]).sum()
    return lambda *given: jax.lax.fori_loop(0, 2, lambda i, carry: step(i, carry, given), jnp.zeros(()))


def seconds(function: Callable, given: tuple[jax.Array, ...]) -> float:
    began = time.process_time()
    jax.block_until_ready(function(*given))
    return time.process_time() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for name, (n, side, inputs, channels, size, stride, padding) in SHAPES.items():
        (out,) = Window(size, stride, padding).sides(side)
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = ((n, side, side, inputs), (size, size, inputs, channels), (n, out, out, channels))
        given = tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
        compiled = {}
        for form, function in forms(size, stride, padding, out).items():
            compiled[form] = (jax.jit(function), 1)
            compiled[f"{form}, in a loop"] = (jax.jit(looped(function)), 2)
        times = {form: [] for form in compiled}
        for repeat in range(arguments.repeats + 1):
            for form, (function, steps) in compiled.items():
                taken = seconds(function, given) / steps
                if repeat:  # the first one compiles
                    times[form].append(taken)
        gflop = 2 * n * out * out * size * size * inputs * channels / 1e9
        rates = {form: gflop / min(taken) for form, taken in times.items()}
        row = {"shape": name, "gflop": gflop, "gflop_per_processor_second": rates, "device": cost.device()}
        rows.append(row)
        print(f"{name:26s} " + ", ".join(f"{form} {rate:.0f}" for form, rate in rates.items()), flush=True)
        arguments.out.mkdir(parents=True, exist_ok=True)
        write_json(arguments.out / "convolution.json", rows)


if __name__ == "__main__":
    main()
