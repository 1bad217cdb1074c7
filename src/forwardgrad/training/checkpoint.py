"""Checkpoints by Orbax: atomic, the last few kept, refused where they belong to another configuration."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from forwardgrad.errors import InputError
from forwardgrad.training.learner import TrainState


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: of the run; they lie in its folder `checkpoints`.
      keep: how many of the last ones stay.
    """

    def __init__(self, directory: Path, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)
        self.directory = directory / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.directory.absolute(), options=options)

    @property
    def latest(self) -> int | None:
        """Step of the latest complete checkpoint."""
        return self._manager.latest_step()

    def save(self, state: TrainState) -> None:
        """Write the state; a process killed meanwhile leaves the checkpoints before it."""
        step = int(state.step)
        if step != self.latest:
            self._manager.save(step, args=ocp.args.StandardSave(_flat(state)))
            self._manager.wait_until_finished()

    def restore(self, like: TrainState) -> TrainState:
        """The latest checkpoint.

        Args:
          like: a state of the same experiment, whose structure and shapes are expected.

        Raises:
          InputError: the checkpoint has another structure, or cannot be read.
        """
        expected = _flat(like)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), expected)
        remedy = "start again in another directory, or remove the damaged checkpoint to go on from the one before."
        try:
            stored = self._manager.restore(self.latest, args=ocp.args.StandardRestore(shapes))
        except Exception as error:  # Orbax raises many kinds
            raise InputError(
                f"checkpoint {self.latest} in {self.directory} cannot be restored ({_short(error)}): {remedy}"
            ) from error
        different = [k for k, x in expected.items() if jnp.shape(stored[k]) != jnp.shape(x)]
        if different:
            raise InputError(
                f"checkpoint {self.latest} in {self.directory} is of another configuration ({different[0]}): {remedy}"
            )
        name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.tree_util.tree_map_with_path(lambda path, x: jnp.asarray(stored.get(name(path), x)), like)

    def read(self) -> dict[str, Any]:
        """The latest checkpoint as `{path: array}`, whatever its structure.

        Raises:
          InputError: there is none, or it cannot be read.
        """
        if self.latest is None:
            raise InputError(f"{self.directory.parent} has no checkpoint yet: let the run reach one, or train again.")
        try:
            return dict(self._manager.restore(self.latest, args=ocp.args.StandardRestore()))
        except Exception as error:  # Orbax raises many kinds
            raise InputError(
                f"checkpoint {self.latest} in {self.directory} cannot be read ({_short(error)}): remove it to use the one before."
            ) from error

    def close(self) -> None:
        self._manager.close()


def _flat(state: TrainState) -> dict[str, Any]:
    """`{path: leaf}`; Orbax refuses arrays without elements, which hold nothing anyway."""
    flat = jax.tree_util.tree_flatten_with_path(state)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in flat if np.size(x)}


def _short(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0][:160] if first else 'no message'}"
