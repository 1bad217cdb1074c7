"""Fashion-MNIST, from its four canonical files in `<data directory>/fashion_mnist`."""

from __future__ import annotations

from pathlib import Path

from forwardgrad.data import idx
from forwardgrad.data.spec import Arrays, DataSet

# The publisher serves these files without encryption; their checksums are what guards them.
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
FILES = idx.IdxFiles(
    train_images=idx.IdxFile(
        "train-images-idx3-ubyte",
        packed="sha256:3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
        unpacked="sha256:c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    ),
    train_labels=idx.IdxFile(
        "train-labels-idx1-ubyte",
        packed="sha256:a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
        unpacked="sha256:bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    ),
    test_images=idx.IdxFile(
        "t10k-images-idx3-ubyte",
        packed="sha256:346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
        unpacked="sha256:5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    ),
    test_labels=idx.IdxFile(
        "t10k-labels-idx1-ubyte",
        packed="sha256:67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
        unpacked="sha256:0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
)
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def load(data_dir: Path, *, offline: bool = False) -> Arrays:
    """60000 training and 10000 test images. Raises `InputError` where the files are neither there nor to be had."""
    images, labels, test_images, test_labels = idx.load(data_dir / "fashion_mnist", FILES, URL, offline=offline)
    return Arrays(
        train_images=images,
        train_labels=labels,
        test_images=test_images,
        test_labels=test_labels,
        classes=10,
        mean=(0.2860,),
        std=(0.3530,),
        class_names=CLASS_NAMES,
    )


dataset = DataSet(
    name="fashion-mnist",
    load=load,
    shape=(28, 28, 1),
    classes=10,
    about="70000 photographs of clothes of 28x28 pixels, made to replace MNIST",
    cite="""@article{xiao2017fashion,
  author = {Xiao, Han and Rasul, Kashif and Vollgraf, Roland},
  title = {Fashion-{MNIST}: a Novel Image Dataset for Benchmarking Machine Learning Algorithms},
  journal = {arXiv preprint arXiv:1708.07747},
  year = {2017},
}""",
)
