"""Reading a run back: parameters and a predict function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from forwardgrad.data import Arrays
from forwardgrad.errors import InputError
from forwardgrad.network import Network
from forwardgrad.presets.experiment import Experiment
from forwardgrad.training.checkpoint import Checkpoints
from forwardgrad.training.loop import read_config


class Run(NamedTuple):
    """A finished or interrupted run at its latest checkpoint.

    Attributes:
      params, model_state: of `network`.
      predict: stored images [batch, height, width, colours] (uint8 as in the data set; normalised inside) to logits [batch, classes].
      step: steps done.
      experiment, config: what was run; the content of `config.json`.
    """

    params: Any
    model_state: Any
    predict: Callable[[Any], jax.Array]
    step: int
    network: Network
    experiment: Experiment[Any]
    config: dict[str, Any]


def load_run(directory: str | Path) -> Run:
    """Read a run directory.

    Args:
      directory: what `forwardgrad train` wrote.

    Raises:
      InputError: it holds no run, no checkpoint, or damaged ones.
    """
    directory = Path(directory)
    config = read_config(directory)
    try:
        experiment = Experiment.from_json(config["experiment"])
        images = {name: config["images"][name] for name in ("shape", "classes", "mean", "std", "scale")}
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{directory} holds a run of another version ({config['version']}; {error}): read it with that one, or train again."
        ) from error
    shape = tuple(images["shape"])
    network = experiment.model.network(shape, images["classes"])
    checkpoints = Checkpoints(directory)
    stored = checkpoints.read()
    checkpoints.close()
    like = dict(zip(("params", "model_state"), jax.eval_shape(network.init, jax.random.key(0)), strict=True))

    def leaf(path: Any, x: jax.ShapeDtypeStruct) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name not in stored or np.shape(stored[name]) != x.shape:
            raise InputError(
                f"the checkpoint in {directory} does not fit its config.json at {name}: train again in another directory."
            )
        return jnp.asarray(stored[name], x.dtype)

    state = jax.tree_util.tree_map_with_path(leaf, like)
    empty = np.zeros((0, *shape), np.uint8)
    nothing = np.zeros(0, np.int32)
    arrays = Arrays(
        empty, nothing, empty, nothing, images["classes"], tuple(images["mean"]), tuple(images["std"]), images["scale"]
    )
    logits = jax.jit(
        lambda params, model_state, x: network.predict(params, model_state, arrays.normalise(x)).to(("batch", "class"))
    )

    def predict(x: Any) -> jax.Array:
        if jnp.shape(x)[1:] != shape:
            raise InputError(
                f"images of shape {jnp.shape(x)} were given: predict takes [batch, {', '.join(map(str, shape))}]."
            )
        return logits(state["params"], state["model_state"], jnp.asarray(x))

    return Run(state["params"], state["model_state"], predict, int(stored["step"]), network, experiment, config)
