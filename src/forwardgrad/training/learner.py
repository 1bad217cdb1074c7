"""One experiment made executable: data on the device, the jitted many-step dispatch, evaluation."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from forwardgrad.bias import bias
from forwardgrad.data import Arrays, augment, batches
from forwardgrad.engine import Estimator
from forwardgrad.parts import Carry
from forwardgrad.presets.experiment import Experiment
from forwardgrad.training.compilation import ANY_ORDER
from forwardgrad.training.optimisers import optimiser


class TrainState(NamedTuple):
    """Everything that the next step depends on besides the experiment: a checkpoint holds exactly this.

    Attributes:
      step: steps done; with the seed it fixes batches, noise and augmentation.
      sums: over the epoch so far: the classifier's loss, its errors, steps.
    """

    params: Any
    model_state: Any
    opt_state: Any
    method_state: Any
    step: jax.Array
    sums: jax.Array


class StepLog(NamedTuple):
    """Per step of a dispatch: the classifier's mean loss, its share of errors on the batch, and the target's loss; float32 [steps]."""

    loss: np.ndarray
    error: np.ndarray
    target: np.ndarray


class Learner:
    """An experiment on given arrays.

    Args:
      experiment: what to train.
      arrays: the data, with the validation images already held out.
      edit: what is made of the experiment's estimator before it trains (see `forwardgrad.wrappers`).

    Attributes:
      bias: after `init` with `allow_bias`, the relative bias of the estimate at each site (see `forwardgrad.bias`).

    Raises:
      InputError: a model that does not fit the images, a method that does not fit the model, a batch larger than the training set.
    """

    longest_dispatch = 64

    def __init__(
        self, experiment: Experiment, arrays: Arrays, edit: Callable[[Estimator], Estimator] = lambda method: method
    ):
        experiment.check()
        self.experiment, self.arrays = experiment, arrays
        self.network = experiment.model.network(arrays.train_images.shape[1:], arrays.classes)
        self.method = edit(experiment.estimator(self.network))
        self.steps_per_epoch = batches.steps_per_epoch(len(arrays.train_images), experiment.batch_size)
        self.total_steps = experiment.epochs * self.steps_per_epoch
        self.optimiser = optimiser(experiment, self.network, self.steps_per_epoch)
        self._checked = False
        self.bias: dict[str, float] | None = None
        self._train = (jnp.asarray(arrays.train_images), jnp.asarray(arrays.train_labels))
        self._test = (jnp.asarray(arrays.test_images), jnp.asarray(arrays.test_labels))
        self._dispatch = jax.jit(self._steps, donate_argnums=0, compiler_options=ANY_ORDER)
        self._count_errors = jax.jit(self._errors)
        self._init_network = jax.jit(self.network.init)
        self._init_method = jax.jit(self.method.initial_state)
        self._seed_everything(experiment.seed)

    def _seed_everything(self, seed: int) -> None:
        init, method, self._key = jax.random.split(jax.random.key(seed), 3)
        self._init_keys = (init, method)
        self._order = functools.lru_cache(maxsize=2)(
            lambda epoch: batches.step_indices(
                seed,
                epoch * self.steps_per_epoch,
                self.steps_per_epoch,
                len(self.arrays.train_images),
                self.experiment.batch_size,
            )
        )

    def with_seed(self, seed: int) -> Learner:
        """The same experiment with another seed; what is compiled serves both."""
        other = copy.copy(self)
        other.experiment = dataclasses.replace(self.experiment, seed=seed)
        other._seed_everything(seed)
        return other

    def init(self) -> TrainState:
        """The state before the first step. Checks the method on four training examples."""
        params, model_state = self._init_network(self._init_keys[0])
        few = slice(0, min(4, len(self.arrays.train_images)))
        batch = {"inputs": self.arrays.normalise(self._train[0][few]), "labels": self._train[1][few]}
        if not self._checked:
            # rounding must not look like a leak
            exact = dataclasses.replace(self.experiment, precision="float32").estimator(self.network)
            exact.check(params, model_state, batch)
            self._checked = True
            if self.experiment.allow_bias:
                self.bias = bias(exact, params, model_state, batch)
        method_state = self._init_method(self._init_keys[1], params, model_state, batch)
        opt_state = self.optimiser.init(params)
        return TrainState(params, model_state, opt_state, method_state, jnp.zeros((), jnp.int32), jnp.zeros(3))

    def run(self, state: TrainState, count: int) -> tuple[TrainState, StepLog]:
        """The next `count` steps, at most `longest_dispatch` of them and within one epoch. `state` is consumed."""
        epoch, done = divmod(int(state.step), self.steps_per_epoch)
        rows = self._order(epoch)[done : done + count]
        indices = np.zeros((self.longest_dispatch, self.experiment.batch_size), np.int32)
        indices[: len(rows)] = rows
        state, log = self._dispatch(state, self._key, *self._train, indices, len(rows))
        return state, StepLog(*(np.asarray(x)[: len(rows)] for x in log))

    def _steps(
        self, state: TrainState, key: jax.Array, images: jax.Array, labels: jax.Array, indices: jax.Array, count: int
    ) -> Any:
        """One compiled loop for any number of steps, so that where a run was interrupted changes no bit."""
        batch = lambda step, i: self._batch(key, step, images[indices[i]], labels[indices[i]])
        method_state = state.method_state
        carry = Carry(state.params, state.model_state, state.opt_state, method_state)
        packed = self.method.pack(carry, batch(state.step, 0)[1])

        def body(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            packed, step, sums, log = carry
            noise, examples = batch(step, i)
            packed, target, info = self.method.step(noise, packed, examples, self.optimiser.update)
            wrong = (info.outputs.to(("batch", "class")).argmax(1) != examples["labels"]).mean()
            loss = info.losses[self.network.blocks[-1].name]
            sums = jnp.where(step % self.steps_per_epoch == 0, 0, sums) + jnp.stack([loss, wrong, jnp.ones(())])
            return packed, step + 1, sums, log.at[:, i].set(jnp.stack([loss, wrong, target]))

        log = jnp.zeros((3, self.longest_dispatch))
        packed, step, sums, log = jax.lax.fori_loop(0, count, body, (packed, state.step, state.sums, log))
        params, model_state, opt_state, method_state = self.method.unpack(packed, method_state)
        return TrainState(params, model_state, opt_state, method_state, step, sums), log

    def _batch(
        self, key: jax.Array, step: jax.Array, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The step's noise key, and its images augmented and normalised."""
        noise, flip, crop = jax.random.split(jax.random.fold_in(key, step), 3)
        if self.experiment.crop:
            images = augment.pad_and_crop(crop, images, self.experiment.crop)
        if self.experiment.flip:
            images = augment.flip(flip, images)
        return noise, {"inputs": self.arrays.normalise(images), "labels": labels}

    def _errors(
        self, params: Any, model_state: Any, images: jax.Array, labels: jax.Array, indices: jax.Array, weight: jax.Array
    ) -> jax.Array:
        def one(args: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, weight = args
            logits = self.network.predict(params, model_state, self.arrays.normalise(images[rows])).to(
                ("batch", "class")
            )
            return ((logits.argmax(1) != labels[rows]) * weight).sum()

        return jax.lax.map(one, (indices, weight)).sum()

    def error(self, state: Any, split: str) -> float:
        """Error of the final classifier in percent, every image once, in evaluation mode and without augmentation.

        Args:
          state: anything with `params` and `model_state`.
          split: "train" or "test" (the held-out images, where there are any).
        """
        images, labels = self._train if split == "train" else self._test
        indices, weight = batches.evaluation_batches(len(images), self.experiment.batch_size)
        wrong = self._count_errors(state.params, state.model_state, images, labels, indices, weight)
        return 100 * float(wrong) / len(images)
