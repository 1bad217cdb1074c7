"""The product of activations and a kernel, with the kernel's gradient in the order that XLA's CPU backend computes fast.

The gradient of W in y = x W is xᵀ δ. XLA computes it from x as it lies, summing over the first axis of both factors, at a half (many columns) to
a tenth (few) of the speed of a product that sums over the left factor's last axis. So x is turned first, or, for few columns, the result:
(δᵀ x)ᵀ. A plain transposition XLA would move back into the product; one that goes through a third axis it leaves alone.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

FEW = 32
"""columns up to which the result is turned, not the activations"""

product_p = Primitive("product")


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`x @ kernel`, [N, C] by [C, K]. Differentiable in both modes, and in both factors."""
    dtype = jnp.result_type(x, kernel)
    return product_p.bind(x.astype(dtype), kernel.astype(dtype))


def turned(x: jax.Array) -> jax.Array:
    """`x.T` of a matrix, in a way that XLA does not move into a product."""
    rows, columns = x.shape
    first = math.gcd(columns, 16)
    return x.reshape(rows, first, columns // first).transpose(1, 2, 0).reshape(columns, rows)


def _kernel_gradient(ct: jax.Array, x: jax.Array, kernel: Any) -> jax.Array:
    return turned(ct.T @ x) if ct.shape[1] <= FEW else turned(x) @ ct


def _batch(args: Any, dims: Any) -> tuple[jax.Array, int]:
    (x, kernel), (at_x, at_kernel) = args, dims
    if at_kernel is None:  # more rows
        x = jnp.moveaxis(x, at_x, 0)
        return product(x.reshape(x.shape[0] * x.shape[1], x.shape[2]), kernel).reshape(*x.shape[:2], kernel.shape[1]), 0
    if at_x is None:  # more columns
        kernel = jnp.moveaxis(kernel, at_kernel, 1)
        return product(x, kernel.reshape(len(kernel), kernel.shape[1] * kernel.shape[2])).reshape(
            len(x), *kernel.shape[1:]
        ), 1
    return jnp.matmul(jnp.moveaxis(x, at_x, 0), jnp.moveaxis(kernel, at_kernel, 0)), 0


product_p.def_impl(jax.jit(jnp.matmul))
product_p.def_abstract_eval(lambda x, kernel: x.update(shape=(x.shape[0], kernel.shape[1])))
mlir.register_lowering(product_p, mlir.lower_fun(jnp.matmul, multiple_results=False))
ad.defbilinear(product_p, lambda ct, x, kernel: ct @ kernel.T, _kernel_gradient)
batching.primitive_batchers[product_p] = _batch
