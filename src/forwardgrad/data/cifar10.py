"""CIFAR-10, from its canonical files in `<data directory>/cifar10/cifar-10-batches-py`."""

from __future__ import annotations

from pathlib import Path

from forwardgrad.data import cifar
from forwardgrad.data.spec import Arrays, DataSet

RELEASE = cifar.Release(
    folder="cifar10/cifar-10-batches-py",
    archive="cifar-10-python.tar.gz",
    archive_checksum="md5:c58f30108f718f92721af3b95e74349a",
    train={
        "data_batch_1": "sha256:54636561a3ce25bd3e19253c6b0d8538147b0ae398331ac4a2d86c6d987368cd",
        "data_batch_2": "sha256:766b2cef9fbc745cf056b3152224f7cf77163b330ea9a15f9392beb8b89bc5a8",
        "data_batch_3": "sha256:0f00d98ebfb30b3ec0ad19f9756dc2630b89003e10525f5e148445e82aa6a1f9",
        "data_batch_4": "sha256:3f7bb240661948b8f4d53e36ec720d8306f5668bd0071dcb4e6c947f78e9682b",
        "data_batch_5": "sha256:d91802434d8376bbaeeadf58a737e3a1b12ac839077e931237e0dcd43adcb154",
    },
    test={"test_batch": "sha256:f53d8d457504f7cff4ea9e021afcf0e0ad8e24a91f3fc42091b8adef61157831"},
    meta={"batches.meta": "sha256:f962466ef690d46b226450fb9aadc74ba4bc64a76aa526b5827fe4bc5c7125cb"},
    labels_key=b"labels",
    names_key=b"label_names",
    classes=10,
)
# The constants of Ren et al. (2023). The deviation is smaller than that of all pixels, 0.247 0.243 0.262.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)


def load(data_dir: Path, *, offline: bool = False) -> Arrays:
    """50000 training and 10000 test images. Raises `InputError` where the files are neither there nor to be had."""
    return cifar.load(data_dir, RELEASE, MEAN, STD, offline=offline)


dataset = DataSet(
    name="cifar10",
    load=load,
    shape=(32, 32, 3),
    classes=10,
    about="60000 colour photographs of 32x32 pixels, of animals and vehicles",
    cite=cifar.CITE,
)
