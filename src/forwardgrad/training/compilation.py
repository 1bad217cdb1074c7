"""How a training step is compiled."""

from __future__ import annotations

ANY_ORDER = {"xla_cpu_enable_fast_math": True}
"""Options for `jax.jit` that let XLA's CPU backend add up in any order, and so in vectors.

A sum is otherwise one addition after another, each waiting for the last. NaN, infinity, division and functions are as ever (XLA's defaults
honour them), and a compiled step gives the same bits every time. Other backends do not read the option.
"""
