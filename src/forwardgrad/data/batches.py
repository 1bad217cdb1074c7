"""Which examples a step sees: a pure function of the seed and of the step's number.

A run that is resumed therefore sees what it would have seen.
"""

from __future__ import annotations

import numpy as np

from forwardgrad.errors import InputError


def epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order of the examples in one epoch.

    Args:
      seed: of the run, from 0.
      epoch: its number, from 0.
      n: number of examples.

    Returns:
      A permutation of `0 .. n - 1`, int32 `[n]`.

    Raises:
      InputError: for a negative seed.
    """
    if seed < 0:
        raise InputError(f"the seed {seed} is negative: choose 0 or a larger number.")
    # NumPy promises the same raw stream in every version; of `Generator.permutation` it does not.
    return np.argsort(np.random.Philox([seed, epoch]).random_raw(n), kind="stable").astype(np.int32)


def steps_per_epoch(n: int, batch_size: int) -> int:
    """The number of full batches in `n` examples. The rest, less than a batch and different in each epoch, is left out.

    Raises:
      InputError: where there is no full batch.
    """
    if not 1 <= batch_size <= n:
        raise InputError(f"no batch of {batch_size} can be taken from {n} examples: choose a batch size from 1 to {n}.")
    return n // batch_size


def step_indices(seed: int, first_step: int, count: int, n: int, batch_size: int) -> np.ndarray:
    """The examples of a run of consecutive steps.

    Each call draws the order of the epochs it touches: ask for many steps at once rather than for one at a time.

    Args:
      seed: of the run, from 0.
      first_step: number of the first step, from 0, counted over all epochs.
      count: number of steps.
      n: number of examples.
      batch_size: examples per step. An epoch is `floor(n / batch_size)` steps, and no example comes twice in it.

    Returns:
      int32 `[count, batch_size]`.

    Raises:
      InputError: where there is no full batch, or the seed or a number of steps is negative.

    Example:
      >>> whole = step_indices(seed=0, first_step=0, count=10, n=100, batch_size=32)
      >>> bool((step_indices(seed=0, first_step=4, count=6, n=100, batch_size=32) == whole[4:]).all())
      True
    """
    if first_step < 0 or count < 0:
        raise InputError(f"no {count} steps can start at step {first_step}: count both from 0.")
    per_epoch = steps_per_epoch(n, batch_size)
    indices = np.empty((count, batch_size), np.int32)
    done = 0
    while done < count:
        epoch, start = divmod(first_step + done, per_epoch)
        take = min(count - done, per_epoch - start)
        order = epoch_order(seed, epoch, n)[start * batch_size : (start + take) * batch_size]
        indices[done : done + take] = order.reshape(take, batch_size)
        done += take
    return indices


def evaluation_batches(n: int, batch_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Every example once and in order, in batches of one size.

    Args:
      n: number of examples.
      batch_size: examples per batch. It may exceed `n`.

    Returns:
      Indices, int32 `[k, batch_size]`, and weights, float32 `[k, batch_size]`: 1, or 0 for padding of the last batch.

    Raises:
      InputError: for an empty set, or a batch size below 1.
    """
    if n < 1 or batch_size < 1:
        raise InputError(f"no batches of {batch_size} can be made of {n} examples: both must be at least 1.")
    places = np.arange(-(-n // batch_size) * batch_size, dtype=np.int32).reshape(-1, batch_size)
    inside = places < n
    return np.where(inside, places, 0).astype(np.int32), inside.astype(np.float32)
