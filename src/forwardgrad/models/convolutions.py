"""Convolution whose gradients XLA's CPU backend computes fast inside a loop, as training runs.

The derivatives of y = x * W are convolutions again: of x by the error, with channels and examples changing places, for W; of the error by the turned
kernel, with its input and output channels changing places, for x. JAX leaves the places changed in the description of the convolution. XLA's
CPU backend has a fast routine for convolutions of the form [batch, row, column, in] by [row, column, in, out] alone; it brings others into
that form outside of loops and computes them place by place within (`benchmarks/convolution.py`: up to 87 times slower). So the axes are
transposed here, and every convolution is of that form.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

convolve_p = Primitive("convolve")


def convolve(x: jax.Array, kernel: jax.Array, stride: int = 1, padding: int = 0) -> jax.Array:
    """y[n, r, c, k] = Σ_ijm x[n, stride r + i, stride c + j, m] W[i, j, m, k], with `padding` zeros around the image.

    Args:
      x: [batch, height, width, in].
      kernel: [row, column, in, out].

    Returns:
      [batch, height, width, out]. Differentiable in both modes, and in both factors.
    """
    dtype = jnp.result_type(x, kernel)
    return convolve_p.bind(x.astype(dtype), kernel.astype(dtype), stride=stride, padding=padding)


def _convolution(x: jax.Array, kernel: jax.Array, padding: Any, **options: Any) -> jax.Array:
    strides = options.pop("stride", 1)
    dimensions = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (strides, strides), padding, dimension_numbers=dimensions, **options)


def _forward(x: jax.Array, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    return _convolution(x, kernel, [(padding, padding)] * 2, stride=stride)


def _input_gradient(ct: jax.Array, x: Any, kernel: jax.Array, *, stride: int, padding: int) -> jax.Array:
    """The error, its pixels `stride` apart, by the turned kernel."""
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    around = []
    for n, out, size in zip(x.aval.shape[1:3], ct.shape[1:3], kernel.shape[:2], strict=True):
        around.append((size - 1 - padding, n - stride * (out - 1) - 1 + padding))
    return _convolution(ct, turned, around, lhs_dilation=(stride, stride))


def _kernel_gradient(ct: jax.Array, x: jax.Array, kernel: Any, *, stride: int, padding: int) -> jax.Array:
    """The image by the error, its pixels `stride` apart: examples are summed over, channels are kept."""
    around, used = [], []
    for n, out, size in zip(x.shape[1:3], ct.shape[1:3], kernel.aval.shape[:2], strict=True):
        after = (
            size + stride * (out - 1) - n - padding
        )  # zeros needed after the image, or pixels of it that no place of the kernel sees
        around.append((padding, max(after, 0)))
        used.append(n + min(after, 0))
    x = x[:, : used[0], : used[1]]
    grad = _convolution(x.transpose(3, 1, 2, 0), ct.transpose(1, 2, 0, 3), around, rhs_dilation=(stride, stride))
    return grad.transpose(1, 2, 0, 3)


def _batch(args: Any, dims: Any, **options: int) -> tuple[jax.Array, int]:
    (x, kernel), (at_x, at_kernel) = args, dims
    if at_kernel is None:  # more examples
        x = jnp.moveaxis(x, at_x, 0)
        out = convolve(x.reshape(-1, *x.shape[2:]), kernel, **options)
        return out.reshape(*x.shape[:2], *out.shape[1:]), 0
    if at_x is None:  # more channels
        kernel = jnp.moveaxis(kernel, at_kernel, 3)
        out = convolve(x, kernel.reshape(*kernel.shape[:3], -1), **options)
        return out.reshape(*out.shape[:3], *kernel.shape[3:]), 3
    return jax.vmap(lambda x, kernel: _forward(x, kernel, **options), dims)(x, kernel), 0


convolve_p.def_impl(jax.jit(_forward, static_argnames=("stride", "padding")))
convolve_p.def_abstract_eval(
    lambda x, kernel, **options: x.update(
        shape=jax.eval_shape(
            lambda x, kernel: _forward(x, kernel, **options),
            *(jax.ShapeDtypeStruct(a.shape, a.dtype) for a in (x, kernel)),
        ).shape
    )
)
mlir.register_lowering(convolve_p, mlir.lower_fun(_forward, multiple_results=False))
ad.defbilinear(convolve_p, _input_gradient, _kernel_gradient)
batching.primitive_batchers[convolve_p] = _batch
