"""CIFAR-100 with its fine labels, from its canonical files in `<data directory>/cifar100/cifar-100-python`."""

from __future__ import annotations

from pathlib import Path

from forwardgrad.data import cifar
from forwardgrad.data.spec import Arrays, DataSet

RELEASE = cifar.Release(
    folder="cifar100/cifar-100-python",
    archive="cifar-100-python.tar.gz",
    archive_checksum="md5:eb9058c3a382ffc7106e4002c42a8d85",
    train={"train": "md5:16019d7e3df5f24257cddd939b257f8d"},
    test={"test": "md5:f0ef6b0ae62326f3e7ffdfab6717acfc"},
    meta={"meta": "md5:7973b15100ade9c7d40fb424638fde48"},
    labels_key=b"fine_labels",
    names_key=b"fine_label_names",
    classes=100,
)
MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)


def load(data_dir: Path, *, offline: bool = False) -> Arrays:
    """50000 training and 10000 test images. Raises `InputError` where the files are neither there nor to be had."""
    return cifar.load(data_dir, RELEASE, MEAN, STD, offline=offline)


dataset = DataSet(
    name="cifar100",
    load=load,
    shape=(32, 32, 3),
    classes=100,
    about="60000 colour photographs of 32x32 pixels, of a hundred kinds of things",
    cite=cifar.CITE,
)
