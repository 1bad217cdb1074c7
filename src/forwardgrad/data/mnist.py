"""MNIST, from its four canonical files in `<data directory>/mnist`."""

from __future__ import annotations

from pathlib import Path

from forwardgrad.data import idx
from forwardgrad.data.spec import Arrays, DataSet

URL = "https://ossci-datasets.s3.amazonaws.com/mnist/"
FILES = idx.IdxFiles(
    train_images=idx.IdxFile(
        "train-images-idx3-ubyte",
        packed="sha256:440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609",
        unpacked="sha256:ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    ),
    train_labels=idx.IdxFile(
        "train-labels-idx1-ubyte",
        packed="sha256:3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c",
        unpacked="sha256:65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    ),
    test_images=idx.IdxFile(
        "t10k-images-idx3-ubyte",
        packed="sha256:8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
        unpacked="sha256:0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    ),
    test_labels=idx.IdxFile(
        "t10k-labels-idx1-ubyte",
        packed="sha256:f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
        unpacked="sha256:ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
)


def load(data_dir: Path, *, offline: bool = False) -> Arrays:
    """60000 training and 10000 test images. Raises `InputError` where the files are neither there nor to be had."""
    images, labels, test_images, test_labels = idx.load(data_dir / "mnist", FILES, URL, offline=offline)
    return Arrays(
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=10,
        mean=(0.1307,),
        std=(0.3081,),
        class_names=tuple("0123456789"),
    )


dataset = DataSet(
    name="mnist",
    load=load,
    shape=(28, 28, 1),
    classes=10,
    about="70000 handwritten digits of 28x28 pixels",
    cite="""@article{lecun1998gradient,
  author = {LeCun, Yann and Bottou, L{\\'e}on and Bengio, Yoshua and Haffner, Patrick},
  title = {Gradient-Based Learning Applied to Document Recognition},
  journal = {Proceedings of the IEEE},
  volume = {86},
  number = {11},
  pages = {2278--2324},
  year = {1998},
}""",
)
