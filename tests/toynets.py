"""A token and channel mixer small enough to enumerate, written in plain JAX, with its losses written a second time without the library.

What is compared with what: `loss(...)` is ordinary JAX under `jax.grad`; `mixer(...)` is the same network under an estimator. Expectations are
means over the rows of a Hadamard matrix (E[u uᵀ] = I exactly: right for means, never for variances) or over all sign vectors.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

import forwardgrad as fg
from forwardgrad.guesses.base import Guess
from forwardgrad.named import Named

N, P, G, C, K = 3, 2, 2, 2, 3  # examples, patches, groups, channels of a group, classes
ROWS = 256  # of the Hadamard matrix: at least the displaced units of both blocks
CELLS = ("batch", "patch", "group")


def norm(h, axes):
    centred = h - h.mean(axes, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axes, keepdims=True) + 1e-2)


def layers(p, h, mark, activation=jax.nn.relu):
    """[batch patch group channel] to the same. Token mixing and the dense layer feed all groups, the grouped layer its own."""
    z = jnp.einsum("npgc,pq->nqgc", norm(h, (1, 2, 3)), p["tok"])
    h = activation(mark(z.reshape(*z.shape[:2], -1), "tok", "batch patch feature"))
    z = mark(norm(h, (2,)) @ p["chan"], "chan", "batch patch unit").reshape(-1, P, G, C)
    z = jnp.einsum("npgc,gcd->npgd", norm(activation(z), (2, 3)), p["grp"])
    return jax.nn.softplus(mark(z, "grp", "batch patch group channel"))


def cells(head, h, labels):
    """A classifier per group at every patch: cells [batch patch group], whose sum is an example's loss."""
    logits = jnp.einsum("npgc,gck->npgk", h, head["head"])
    onehot = jax.nn.one_hot(labels, K, dtype=logits.dtype)[:, None, None]
    return -(onehot * jax.nn.log_softmax(logits)).sum(-1) / (P * G)


def readout():
    """The same in two steps, as the library wants it."""

    def outputs(head, h):
        return Named(jnp.einsum("npgc,gck->npgk", h, head["head"]), (*CELLS, "class"))

    def losses(out, batch):
        onehot = jax.nn.one_hot(batch["labels"], K, dtype=out.value.dtype)[:, None, None]
        return Named(-(onehot * jax.nn.log_softmax(out.value)).sum(-1) / (P * G), out.axes[:-1])

    return fg.Readout(outputs, losses, init=lambda key: {"head": jax.random.normal(key, (G, C, K))})


def init_layers(key):
    shapes = {"tok": (P, P), "chan": (G * C, G * C), "grp": (G, C, C)}
    return {name: jax.random.normal(jax.random.fold_in(key, i), s) for i, (name, s) in enumerate(shapes.items())}, ()


WEIGHTS = {"tok": ("in", "patch"), "chan": ("in", "unit"), "grp": ("group", "in", "channel")}


@functools.cache
def mixer(blocks=2, wrap="plain", activation=jax.nn.relu, mark=fg.tap):
    """A network of equal blocks. `wrap`: plain, or the layers inside an inner `jit` or `jax.checkpoint`."""
    inner = {"plain": lambda f: f, "jit": jax.jit, "remat": jax.checkpoint}[wrap]
    apply = inner(lambda p, h: layers(p, h, mark, activation))
    block = lambda i: fg.Block(f"b{i}", lambda p, s, h, train: (apply(p, h), s), readout(), init_layers, WEIGHTS)
    return fg.Network(tuple(block(i) for i in range(blocks)))


def loss(params, batch, target):
    """The target's loss without the library. `target`: "global", "local" (cut between blocks) or "flowing" (not cut)."""
    h, total = batch["inputs"], 0.0
    weight = batch.get("weight", jnp.full(len(h), 1 / len(h)))
    for i, p in enumerate(params.values()):
        h = jax.lax.stop_gradient(h) if target == "local" else h
        h = layers(p["layers"], h, lambda z, name, axes: z)
        if target != "global" or i == len(params) - 1:
            total += (weight * cells(p["readout"], h, batch["labels"]).sum((1, 2))).sum()
    return total


def setting(model, n=6):
    """Network, parameters, model state and batch of a model from its configuration, on images of 4 x 4, in double precision."""
    network = model.network((4, 4, 1), 3)
    params, state = jax.tree.map(lambda x: x.astype(jnp.float64), network.init(jax.random.key(0)))
    batch = {"inputs": jax.random.normal(jax.random.key(1), (n, 4, 4, 1), jnp.float64), "labels": jnp.arange(n) % 3}
    return network, params, state, batch


def two_steps(method, params, model_state, batch):
    """Both estimates, and the state that they leave: guesses learn in between."""
    out, state = [], jax.jit(method.initial_state)(jax.random.key(2), params, model_state, batch)
    step = jax.jit(method.estimate)
    for key in (3, 4):
        estimate, state, model_state = step(jax.random.key(key), state, params, model_state, batch)
        out.append(estimate)
    return out, state, model_state


TARGETS = {"global": fg.global_loss(), "local": fg.local(), "flowing": fg.local(cut=False)}


@functools.cache
def problem(blocks=2, n=N):
    """Parameters, model state and batch of the mixer."""
    with jax.ensure_compile_time_eval():  # kept between tests: never as a tracer
        params, state = mixer(blocks).init(jax.random.key(0))
        inputs = jax.random.normal(jax.random.key(1), (n, P, G, C))
        return params, state, {"inputs": inputs, "labels": jnp.arange(n) % K}


@functools.cache
def gradient(target, blocks=2):
    params, _, batch = problem(blocks)
    with jax.ensure_compile_time_eval():
        return jax.jit(jax.grad(loss), static_argnums=2)(params, batch, target)


def hadamard(size=ROWS):
    rows = np.ones((1, 1))
    while len(rows) < size:
        rows = np.block([[rows, rows], [rows, -rows]])
    return rows


def all_signs(size):
    return np.array(list(itertools.product((-1.0, 1.0), repeat=size)))


def gauss(size):
    """Nodes [3^size, size] and their probabilities: a Gaussian's moments up to degree 5 in each coordinate, and so the variance of an estimate."""
    nodes = np.array(list(itertools.product((-(3**0.5), 0.0, 3**0.5), repeat=size)))
    return nodes, np.where(nodes == 0, 2 / 3, 1 / 6).prod(1)


def along(row):
    """The guess whose one direction is `row`, cut into pieces for the sites of a scope in the order of their names."""

    def propose(key, state, view):
        out, start = {}, 0
        for name, site in sorted(view.sites.items()):
            size = math.prod(site.noise_shape)
            assert start + size <= len(row), "more units than the row is long"
            out[name] = Named(row[start : start + size].reshape(site.noise_shape), site.noise_axes)
            start += size
        return out

    return Guess(propose, name="one row")


FIXED = along(np.random.default_rng(0).normal(size=4 * ROWS))  # where a test needs a direction and no particular one


def once(method, params, state, batch, key=None):
    """One estimate by a fresh state, unchecked."""
    method = dataclasses.replace(method, allow_bias=True)
    guess_state = method.init(jax.random.key(2), params, state, batch)
    return method.estimate(jax.random.key(3) if key is None else key, guess_state, params, state, batch)[0]


def estimates(build, rows, case):
    """Gradients for each row, stacked; `build(guess)` makes the estimator."""
    return jax.jit(jax.vmap(lambda row: once(build(along(row)), *case).grads))(jnp.asarray(rows))


def mean(tree):
    return jax.tree.map(lambda x: x.mean(0), tree)


def distance(a, b):
    """Largest absolute difference between two pytrees of one structure."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    assert all(jnp.shape(x) == jnp.shape(y) for x, y in pairs)
    return float(np.max([jnp.abs(x - y).max() for x, y in pairs]))  # not Python's max, which passes over NaN


def flat(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
