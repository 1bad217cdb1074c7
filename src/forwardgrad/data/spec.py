"""What a data set is: its description, and its arrays with the constants that normalise them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from forwardgrad.errors import InputError


@dataclasses.dataclass(frozen=True, eq=False)
class Arrays:
    """The images and labels of a data set, as they were stored, in the host's memory.

    Attributes:
      train_images: uint8 or float32 `[N, H, W, C]`. uint8 takes a quarter of the memory: keep it so, on the device too.
      train_labels: int32 `[N]`, in `0 .. classes - 1`.
      test_images: the same as `train_images`, `[M, H, W, C]`.
      test_labels: int32 `[M]`.
      classes: number of classes.
      mean: per channel, of the training images divided by `scale`.
      std: per channel, of the training images divided by `scale`.
      scale: what stored values are divided by to lie in [0, 1]: 255 for bytes, 1 for images stored as floats.
      class_names: one name per class, or empty where there are none.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: float = 255.0
    class_names: tuple[str, ...] = ()

    def normalise(self, images: jax.Array | np.ndarray) -> jax.Array:
        """Scaled and standardised images: `(images / scale - mean) / std`. To be called inside `jit`, on a batch.

        Args:
          images: stored images `[..., H, W, C]`, of any real type.

        Returns:
          float32, of the same shape.

        Example:
          >>> from forwardgrad.data import data_directory, find
          >>> arrays = find("digits").load(data_directory())
          >>> jax.jit(arrays.normalise)(arrays.train_images[:32]).shape
          (32, 8, 8, 1)
        """
        scaled = jnp.asarray(images).astype(jnp.float32) / jnp.float32(self.scale)
        return (scaled - jnp.asarray(self.mean, jnp.float32)) / jnp.asarray(self.std, jnp.float32)

    def symmetric(self) -> Arrays:
        """The same data, whose `normalise` scales to [-1, 1] instead of standardising.

        Returns:
          A copy (the same memory) with `mean` and `std` of 0.5.
        """
        half = (0.5,) * len(self.mean)
        return dataclasses.replace(self, mean=half, std=half)

    def validation(self, n: int) -> Arrays:
        """The same data with the last `n` training examples held out, in place of the test set.

        The published data sets are in random order. Arrays sorted by class must be shuffled first, or the last examples
        are of few classes.

        Args:
          n: number of examples to hold out, from 1 to the number of training examples less one.

        Returns:
          A copy (views of the same memory); `mean` and `std` stay as they are.

        Raises:
          InputError: where nothing would be left on either side.
        """
        if not 1 <= n < len(self.train_images):
            raise InputError(
                f"cannot hold out {n} of {len(self.train_images)} training images for validation: "
                f"choose a number from 1 to {len(self.train_images) - 1}."
            )
        return dataclasses.replace(
            self,
            train_images=self.train_images[:-n],
            train_labels=self.train_labels[:-n],
            test_images=self.train_images[-n:],
            test_labels=self.train_labels[-n:],
        )

    def first(self, n: int) -> Arrays:
        """The same data with the first `n` training examples only.

        Args:
          n: from 1 to the number of training examples.

        Returns:
          A copy (views of the same memory); `mean` and `std` stay as they are.

        Raises:
          InputError: there are fewer.
        """
        if not 1 <= n <= len(self.train_images):
            raise InputError(
                f"cannot take the first {n} of {len(self.train_images)} training images: set --train-images from 1 to "
                f"{len(self.train_images)}, or to 0 for all."
            )
        return dataclasses.replace(self, train_images=self.train_images[:n], train_labels=self.train_labels[:n])


class Load(Protocol):
    """Reads a data set from `data_dir`, or first fetches it there unless `offline`; `InputError` where it cannot."""

    def __call__(self, data_dir: Path, *, offline: bool = False) -> Arrays: ...


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set that has not been read yet.

    Attributes:
      name: what the user writes.
      load: reads it: `load(data_dir, offline=False) -> Arrays`.
      shape: of one image, `(H, W, C)`.
      classes: number of classes.
      about: one line.
      cite: BibTeX of its source; empty where there is none.
    """

    name: str
    load: Load
    shape: tuple[int, int, int]
    classes: int
    about: str
    cite: str = ""
