"""How a training step is compiled."""

from __future__ import annotations

ANY_ORDER = {"xla_cpu_enable_fast_math": True} """Options for `jax.jit` that let XLA's CPU backend add up in any order, and so in vectors: a sum is
otherwise one addition after another, each waiting for the last. NaN and infinity, division and functions are as ever (XLA's defaults honour them),
and what is compiled once gives the same bits
always. Other backends do not read it."""
