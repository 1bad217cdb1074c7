"""Seconds, memory and floating-point operations of one training step: estimate and update, on random images."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from forwardgrad import checks, recipes, streaming
from forwardgrad.engine import Estimator
from forwardgrad.errors import InputError
from forwardgrad.losses.products import product_p
from forwardgrad.network import Network
from forwardgrad.parts import Carry
from forwardgrad.presets.experiment import Experiment
from forwardgrad.training.compilation import ANY_ORDER
from forwardgrad.training.optimisers import optimiser

MIB = 2**20


class Task(NamedTuple):
    """What is timed: an experiment's step on images of this shape."""

    experiment: Experiment[Any]
    shape: tuple[int, ...]
    classes: int

    @property
    def network(self) -> Network:
        return self.experiment.model.network(self.shape, self.classes)


class Compiled(NamedTuple):
    """A compiled function ready to run.

    Attributes:
      run: takes nothing; returns when the step is done.
      temp_mib: XLA's temporary buffers, in MiB: arguments, results and what is updated in place are not among them.
      held_mib: arguments and results.
      compile_seconds: tracing and compiling.
    """

    run: Callable[[], None]
    temp_mib: float
    held_mib: float
    compile_seconds: float

    @property
    def total_mib(self) -> float:
        return self.temp_mib + self.held_mib


def _batch_shapes(task: Task) -> dict[str, jax.ShapeDtypeStruct]:
    n = task.experiment.batch_size
    return {
        "inputs": jax.ShapeDtypeStruct((n, *task.shape), jnp.float32),
        "labels": jax.ShapeDtypeStruct((n,), jnp.int32),
    }


def _batch(task: Task) -> dict[str, jax.Array]:
    n = task.experiment.batch_size
    images = jax.random.normal(jax.random.key(1), (n, *task.shape))
    return {"inputs": images, "labels": jnp.arange(n) % task.classes}


@functools.lru_cache(maxsize=2)
def _weights(model: Any, shape: tuple[int, ...], classes: int) -> tuple[Any, Any]:
    """Parameters and model state, a little off the initial ones: a classifier that starts at zero is no typical one."""

    def make() -> tuple[Any, Any]:
        params, model_state = model.network(shape, classes).init(jax.random.key(0))
        return jax.tree.map(lambda x: x + 0.01 * jax.random.normal(jax.random.key(2), x.shape), params), model_state

    return jax.jit(make)()


def _initial(task: Task, method: Estimator, params: Any, model_state: Any, batch: Any) -> Any:
    """What `Estimator.step` changes, before the first step."""
    state = method.initial_state(jax.random.key(3), params, model_state, batch)
    opt_state = optimiser(task.experiment, task.network, 1000).init(params)
    return method.pack(Carry(params, model_state, opt_state, state), batch)


def step(task: Task, *, run: bool = True) -> Compiled:
    """The training step. With `run=False` it is compiled and never allocated: `Compiled.run` then raises."""
    experiment, network = task.experiment, task.network
    method = experiment.estimator(network)
    update = optimiser(experiment, network, 1000).update
    step = lambda packed, batch: method.step(jax.random.key(4), packed, batch, update)[:2]
    one = jax.jit(step, donate_argnums=0, compiler_options=ANY_ORDER)
    make = jax.jit(lambda *weights_and_batch: _initial(task, method, *weights_and_batch))
    shapes = _batch_shapes(task)
    known = _weights if run else lambda *_: jax.eval_shape(network.init, jax.random.key(0))
    weights = known(experiment.model, task.shape, task.classes)
    begin = time.monotonic()
    compiled = one.lower(jax.eval_shape(make, *weights, shapes), shapes).compile()
    seconds = time.monotonic() - begin
    temp, arguments = memory(compiled)
    held: dict[str, Any] = {}

    def go() -> None:
        if not run:
            raise RuntimeError("this step was compiled for its numbers alone")
        if not held:
            held["batch"] = _batch(task)
            held["packed"] = make(*weights, held["batch"])
        held["packed"], loss = compiled(held["packed"], held["batch"])
        jax.block_until_ready((held["packed"], loss))

    return Compiled(go, temp, arguments, seconds)


def memory(compiled: Any) -> tuple[float, float]:
    """MiB of temporaries, and of arguments and results (what a result takes over from an argument counts once)."""
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return memory.temp_size_in_bytes / MIB, held / MIB


def forward(task: Task) -> Compiled:
    """The network's prediction, nothing else, by the same microbatches."""
    network, n = task.network, task.experiment.batch_size
    size = task.experiment.microbatch or n
    assert size != "auto"
    params, model_state = _weights(task.experiment.model, task.shape, task.classes)

    def predict(params: Any, images: jax.Array) -> jax.Array:
        pieces = images.reshape(n // size, size, *task.shape)
        return jax.lax.map(lambda x: network.predict(params, model_state, x).value, pieces)

    begin = time.monotonic()
    images = _batch(task)["inputs"]
    compiled = jax.jit(predict, compiler_options=ANY_ORDER).lower(params, images).compile()
    seconds = time.monotonic() - begin
    return Compiled(lambda: _wait(compiled(params, images)), *memory(compiled), seconds)


def _wait(result: Any) -> None:
    jax.block_until_ready(result)


def product() -> Compiled:
    """An 8192 x 512 x 512 product: what the machine can do with a matrix (4.29 GFLOP)."""
    a, b = jnp.ones((8192, 512)), jnp.ones((512, 512))
    compiled = jax.jit(jnp.matmul).lower(a, b).compile()
    return Compiled(lambda: _wait(compiled(a, b)), 0.0, 0.0, 0.0)


def seconds(
    functions: Mapping[Any, Callable[[], None]], repeats: int, of: Callable[[list[float]], float] = statistics.median
) -> dict[Any, float]:
    """Seconds of each, the repeats of all of them interleaved, after a call to warm up: their median, or `of` them."""
    taken: dict[Any, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(repeats):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            taken[name].append(time.perf_counter() - begin)
    return {name: of(values) for name, values in taken.items()}


def microbatches(task: Task) -> list[int]:
    """Microbatches worth trying, 0 for the whole batch: a CPU's cache wants few examples, an accelerator all of them.

    The whole batch alone where the method or the network refuses others (BatchNorm, scalars for the whole batch).
    """
    n = task.experiment.batch_size
    sizes = [size for size in (4, 8, 16) if size < n and n % size == 0] if jax.default_backend() == "cpu" else []
    task.experiment.estimator(task.network)  # what cannot train at all is no reason for the whole batch
    try:
        _refuse_microbatches(task, sizes)
    except InputError:
        return [0]
    return [*sizes, 0]


def refuse(task: Task, sizes: Iterable[int]) -> None:
    """Refuse what training, by these microbatches, would refuse, but for bias.

    Raises:
      InputError: a size that does not divide the batch, or by which the result would be another one; a method that the network cannot serve.
    """
    sizes = list(sizes)
    for size in sizes:
        with_microbatch(task, size).experiment.check()
    method, weights = task.experiment.estimator(task.network), jax.eval_shape(task.network.init, jax.random.key(0))
    jax.eval_shape(lambda *a: method.initial_state(jax.random.key(0), *a), *weights, _batch_shapes(task))
    _refuse_microbatches(task, sizes)


def _refuse_microbatches(task: Task, sizes: list[int]) -> None:
    if any(sizes):
        network = task.network
        images = jax.random.normal(jax.random.key(1), (4, *task.shape))
        method = dataclasses.replace(task.experiment, precision="float32").estimator(network)
        batch = {"inputs": images, "labels": jnp.zeros(4, int)}
        checks.refuse_microbatches(method, *network.init(jax.random.key(0)), batch)


def with_microbatch(task: Task, size: int) -> Task:
    return task._replace(experiment=dataclasses.replace(task.experiment, microbatch=size))


class Tried(NamedTuple):
    """One microbatch size; `seconds` is `None` where it was not timed: it would not fit in memory, or there was no other."""

    microbatch: int
    seconds: float | None
    compiled: Compiled


def fastest(task: Task, sizes: Iterable[int], repeats: int) -> tuple[Tried, list[Tried]]:
    """The microbatch with the least time, and all that were tried. Where none fits in memory, the one that needs least."""
    compiled = {size: step(with_microbatch(task, size)) for size in sizes}
    fitting = {size: c.run for size, c in compiled.items() if fits(c)}
    taken = seconds(fitting, repeats) if len(fitting) > 1 else {}
    tried = {size: Tried(size, taken.get(size), c) for size, c in compiled.items()}
    if fitting:
        return tried[min(fitting, key=lambda size: taken.get(size, 0.0))], list(tried.values())
    return min(tried.values(), key=lambda t: t.compiled.total_mib), list(tried.values())


def is_streamed(task: Task) -> bool:
    """Which executor the step uses."""
    method, shapes = task.experiment.estimator(task.network), _batch_shapes(task)
    params, model_state = jax.eval_shape(task.network.init, jax.random.key(0))
    answer: list[bool] = []
    jax.eval_shape(lambda *a: answer.append(method.streams(*a)), params, model_state, shapes)
    return answer[0]


def device() -> str:
    """What the numbers were measured on: the accelerator, or the processor and how many cores of it."""
    one = jax.local_devices()[0]
    if one.platform != "cpu":
        return one.device_kind
    found = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    cores = len(os.sched_getaffinity(0))
    return f"{found.group(1) if found else one.device_kind}, {cores} core{'s' if cores > 1 else ''}"


# memory


def available_mib() -> float:
    """Memory that can still be had, in MiB: the device's, or the machine's."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return (stats["bytes_limit"] - stats.get("bytes_in_use", 0)) / MIB
    found = re.search(r"MemAvailable:\s+(\d+)", _read("/proc/meminfo"))
    return int(found.group(1)) / 1024 if found else float("inf")


def fits(compiled: Compiled) -> bool:
    """Whether the step may be run: nine tenths of what is free is the limit."""
    return compiled.total_mib < 0.9 * available_mib()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def peak_mib(task: Task) -> float | None:
    """Real peak of a step's memory, in a process of its own: the device's, or what the step holds and how far resident memory rises in it above that.

    On a CPU the first step, with all that happens once, is not measured; an accelerator tells the peak of the whole process. `None` where the
    system does not tell, or kills the process.

    Raises:
      RuntimeError: the process fails.
    """
    spec = {"experiment": task.experiment.to_json(), "shape": task.shape, "classes": task.classes}
    # Every large buffer of the host a mapping of its own (glibc), or what compilation has freed but kept would hide the step's.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "forwardgrad.diagnostics.cost"],
        input=json.dumps(spec),
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, -signal.SIGKILL):
        raise RuntimeError(f"the process that measures the peak of memory failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def _peak_here(task: Task) -> float | None:
    device = jax.local_devices()[0]
    compiled = step(task)
    compiled.run()
    _give_back()
    resident = lambda field: re.search(rf"{field}:\s+(\d+) kB", _read("/proc/self/status"))
    before = resident("VmRSS")
    with_reset = _reset_peak()
    compiled.run()
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"] / MIB
    peak = resident("VmHWM")
    return (
        compiled.held_mib + (int(peak.group(1)) - int(before.group(1))) / 1024
        if with_reset and peak and before
        else None
    )


def _give_back() -> None:
    """glibc: what has been freed goes back to the system. Elsewhere it does so by itself, or not at all."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_peak() -> bool:
    """Linux: the high-water mark of resident memory falls to what is resident now (compilation has had its own peak)."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return True
    except OSError:
        return False


# operations


def gflop_by_hand(task: Task) -> float:
    """Products of matrices in one step: those of a forward pass times the passes that the recipe states (2 for a multiply-add)."""
    experiment = task.experiment
    shapes = _batch_shapes(task)
    network = task.network
    params, model_state = jax.eval_shape(network.init, jax.random.key(0))
    jaxpr = jax.make_jaxpr(lambda p, s, x: network.predict(p, s, x).value)(params, model_state, shapes["inputs"])
    return recipes.find(experiment.method).passes(experiment.draws) * _products(jaxpr.jaxpr) / 1e9


def _products(jaxpr: Any) -> float:
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracting, _), _ = eqn.params["dimension_numbers"]
            inner = 1
            for axis in contracting:
                inner *= eqn.invars[0].aval.shape[axis]
            if inner > 1 and eqn.outvars[0].aval.shape[-1] > 1:  # means are written as products, and are none
                total += 2.0 * inner * eqn.outvars[0].aval.size
        elif eqn.primitive is product_p:
            total += 2.0 * eqn.invars[0].aval.size * eqn.outvars[0].aval.shape[1]
        elif eqn.primitive.name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / kernel.shape[features]
        times = eqn.params.get("length", 1)  # of a scan
        for value in eqn.params.values():
            inner_jaxpr = getattr(value, "jaxpr", value)
            if hasattr(inner_jaxpr, "eqns"):
                total += times * _products(inner_jaxpr)
    return total


def gflop_by_xla(task: Task, examples: int = 8) -> float | None:
    """XLA's count for the optimised step by the whole executor, without loops (it counts a loop's body once), scaled from few examples.

    Everything is counted: elementwise work, noise and the update too. `None` beyond 8 blocks, whose loop-free form takes minutes to compile, and
    with checkpoints, which XLA undoes outside of loops.
    """
    experiment = task.experiment
    network = task.network
    if len(network.blocks) > 9 or streaming.is_looped(experiment.estimator(network)):
        return None
    examples = min(examples, experiment.batch_size)
    small = dataclasses.replace(experiment, batch_size=examples, microbatch=0, executor="whole")
    method, update = small.estimator(network), optimiser(small, network, 1000).update
    here = task._replace(experiment=small)
    shapes = _batch_shapes(here)
    weights = jax.eval_shape(network.init, jax.random.key(0))
    packed = jax.eval_shape(lambda *a: _initial(here, method, *a), *weights, shapes)
    one = jax.jit(lambda packed, batch: method.step(jax.random.key(4), packed, batch, update)[:2])
    analysis = one.lower(packed, shapes).compile().cost_analysis() or {}
    return analysis.get("flops", 0.0) / 1e9 * experiment.batch_size / examples


if __name__ == "__main__":
    given = json.loads(sys.stdin.read())
    task = Task(Experiment.from_json(given["experiment"]), tuple(given["shape"]), given["classes"])
    print(json.dumps(_peak_here(task)))
