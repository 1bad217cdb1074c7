"""What bfloat16 does to an estimate: the same batch and noise in both precisions.

    python benchmarks/precision.py --out DIR [--preset cifar10-m-8-16] [--methods bp,lg-bp,lg-fg-a] [--batch 32]

For each method: relative difference |g16 - g32| / |g32| and cosine of the two estimates over all weights; for scale, |g32 - g32'| / |g32| with g32'
drawn by another key. Random images of the data set's shape, random weights.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp

from forwardgrad import data, presets
from forwardgrad.diagnostics import cost
from forwardgrad.training.metrics import write_json


def flat(tree) -> jax.Array:
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--preset", default="cifar10-m-8-16")
    parser.add_argument("--methods", default="bp,lg-bp,lg-fg-a,lg-fg-w")
    parser.add_argument("--batch", type=int, default=32)
    arguments = parser.parse_args()
    preset = presets.find(arguments.preset)
    about = data.find(preset.dataset)
    batch = {
        "inputs": jax.random.normal(jax.random.key(1), (arguments.batch, *about.shape)),
        "labels": jnp.arange(arguments.batch) % about.classes,
    }
    rows = []
    for name in arguments.methods.split(","):

        def estimate(precision: str, key: int, name=name) -> jax.Array:
            experiment = dataclasses.replace(preset, method=name, precision=precision, microbatch=0)
            network = experiment.model.network(about.shape, about.classes)
            params, model_state = network.init(jax.random.key(0))
            params = jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(2), x.shape), params)
            method = experiment.estimator(network)
            state = method.initial_state(jax.random.key(3), params, model_state, batch)
            return flat(jax.jit(method.estimate)(jax.random.key(key), state, params, model_state, batch)[0].grads)

        one, rounded, other = estimate("float32", 4), estimate("bfloat16", 4), estimate("float32", 5)
        size = jnp.linalg.norm(one)
        row = {
            "method": name,
            "preset": arguments.preset,
            "batch": arguments.batch,
            "relative_difference": float(jnp.linalg.norm(rounded - one) / size),
            "cosine": float(one @ rounded / size / jnp.linalg.norm(rounded)),
            "difference_of_two_draws": float(jnp.linalg.norm(one - other) / size),
            "device": cost.device(),
        }
        rows.append(row)
        print(
            f"{name:16s} bfloat16 against float32: relative difference {row['relative_difference']:.4f}, cosine {row['cosine']:.5f}; "
            f"two draws of noise differ by {row['difference_of_two_draws']:.3f}"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "precision.json", rows)


if __name__ == "__main__":
    main()
