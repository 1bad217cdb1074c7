"""The digits that come with scikit-learn: nothing to download, and small enough to train on in seconds."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from forwardgrad.data.spec import Arrays, DataSet


def load(data_dir: Path, *, offline: bool = False) -> Arrays:
    """1437 training and 360 test images, split once and for all with the classes in proportion.

    The data directory is not used.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, classes = load_digits(return_X_y=True)
    images = np.asarray(pixels).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = np.asarray(classes).astype(np.int32)
    train, test = train_test_split(np.arange(len(labels)), test_size=360, stratify=labels, random_state=0)
    return Arrays(
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
        classes=10,
        mean=(0.3054,),
        std=(0.3761,),
        scale=16.0,
        class_names=tuple("0123456789"),
    )


dataset = DataSet(
    name="digits",
    load=load,
    shape=(8, 8, 1),
    classes=10,
    about="1797 handwritten digits of 8x8 pixels, which come with scikit-learn",
    cite="""@misc{alpaydin1998digits,
  author = {Alpaydin, Ethem and Kaynak, Cenk},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}""",
)
