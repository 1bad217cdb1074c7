"""Data sets: reading, refusing, fetching, batching, augmenting."""

import functools
import gzip
import hashlib
import http.server
import io
import os
import pickle
import re
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from forwardgrad import data
from forwardgrad.data import (
    augment,
    batches,
    cifar,
    cifar10,
    cifar100,
    download,
    files,
    idx,
    mnist,
    npz,
    pickles,
    tiny_imagenet,
)
from forwardgrad.errors import InputError

pytestmark = pytest.mark.filterwarnings("error")

REAL = os.environ.get(files.VARIABLE)
URL = "http://example.invalid/"


@pytest.fixture(autouse=True)
def _no_data_of_the_user(monkeypatch, tmp_path):
    monkeypatch.delenv(files.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def sha256(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# ---------------------------------------------------------------------------------------------------------------- names


def test_names_are_found_and_described():
    assert data.names() == ["cifar10", "cifar100", "digits", "fashion-mnist", "mnist", "tiny-imagenet"]
    for name in data.names():
        dataset = data.find(name)
        assert dataset.name == name
        assert len(dataset.shape) == 3
        assert dataset.about
        assert "\n" not in dataset.about
        assert dataset.cite.startswith("@")


def test_a_new_module_is_found_without_registering(monkeypatch, tmp_path):
    (tmp_path / "extra_set.py").write_text(
        "from forwardgrad.data.spec import DataSet\n"
        "dataset = DataSet('extra', lambda data_dir, *, offline=False: None, (1, 1, 1), 2, 'an example')\n"
    )
    monkeypatch.setattr(data, "__path__", [*data.__path__, str(tmp_path)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert data.find("extra").shape == (1, 1, 1)
    sys.modules.pop("forwardgrad.data.extra_set")


def test_unknown_name_names_the_nearest_and_the_way_to_own_arrays():
    with pytest.raises(InputError, match=r"unknown data set 'cifar': did you mean 'cifar10'.*npz:FILE"):
        data.find("cifar")


def test_nothing_heavy_is_imported_before_it_is_needed():
    code = "import sys, forwardgrad.data as d; d.names(); sys.exit('sklearn' in sys.modules or 'rich' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist", "mnist"])
def test_offline_without_files_names_folder_files_and_address(name, tmp_path):
    with pytest.raises(InputError, match=r"no (train|data_batch_1).* in .*: put the files .*http.*--offline") as error:
        data.find(name).load(tmp_path, offline=True)
    assert str(tmp_path / name.replace("-", "_")) in str(error.value)
    assert tree(tmp_path) == {}


# --------------------------------------------------------------------------------------------------------------- digits


def test_digits_split_is_fixed_stratified_and_disjoint(tmp_path):
    arrays = data.find("digits").load(tmp_path / "not there", offline=True)
    assert arrays.train_images.shape == (1437, 8, 8, 1)
    assert arrays.test_images.shape == (360, 8, 8, 1)
    assert arrays.train_images.dtype == np.uint8
    assert arrays.train_labels.dtype == np.int32
    # Each class gives a fifth of itself to the test, to the nearest image.
    tested, trained = np.bincount(arrays.test_labels), np.bincount(arrays.train_labels)
    assert np.abs(tested - 0.2 * (tested + trained)).max() < 1
    # Fixed: the very same images on every machine.
    assert sha256(arrays.test_images.tobytes()).startswith("sha256:3cc232bd25364446")
    # Disjoint: together they are all images, each as often as scikit-learn has it.
    from sklearn.datasets import load_digits

    both = np.concatenate([arrays.train_images, arrays.test_images]).reshape(-1, 64)
    assert sorted(map(bytes, both)) == sorted(map(bytes, load_digits().data.astype(np.uint8)))
    scaled = arrays.train_images / arrays.scale
    assert scaled.max() == 1
    np.testing.assert_allclose((scaled.mean(), scaled.std()), (*arrays.mean, *arrays.std), atol=5e-5)


# ----------------------------------------------------------------------------------------------------------------- spec


def some_arrays(dtype=np.uint8) -> data.Arrays:
    images = np.random.default_rng(0).integers(0, 256, (10, 4, 3, 2)).astype(dtype)
    labels = np.arange(10, dtype=np.int32) % 3
    return data.Arrays(images, labels, images[:4], labels[:4], classes=3, mean=(0.5, 0.25), std=(0.2, 0.5))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_normalise_inside_jit(dtype):
    arrays = some_arrays(dtype)
    out = jax.jit(arrays.normalise)(jnp.asarray(arrays.train_images))
    assert out.dtype == jnp.float32
    expected = (arrays.train_images / 255.0 - np.array([0.5, 0.25])) / np.array([0.2, 0.5])
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-6)


def test_symmetric_pixels_lie_between_minus_one_and_one():
    arrays = some_arrays()
    symmetric = arrays.symmetric()
    np.testing.assert_allclose(
        symmetric.normalise(arrays.train_images), arrays.train_images / 127.5 - 1, rtol=1e-5, atol=1e-6
    )
    assert symmetric.train_images is arrays.train_images


def test_validation_takes_the_place_of_the_test():
    arrays = some_arrays()
    held = arrays.validation(3)
    np.testing.assert_array_equal(held.train_images, arrays.train_images[:7])
    np.testing.assert_array_equal(held.train_labels, arrays.train_labels[:7])
    np.testing.assert_array_equal(held.test_images, arrays.train_images[7:])
    np.testing.assert_array_equal(held.test_labels, arrays.train_labels[7:])
    assert (held.mean, held.std, held.classes) == (arrays.mean, arrays.std, arrays.classes)


@pytest.mark.parametrize("n", [-1, 0, 10, 11])
def test_impossible_validation(n):
    with pytest.raises(InputError, match=f"cannot hold out {n} of 10 .*choose a number from 1 to 9"):
        some_arrays().validation(n)


# ---------------------------------------------------------------------------------------------------------- directories


def test_data_directory_order(monkeypatch, tmp_path):
    assert data.data_directory() == tmp_path / "cache" / "forwardgrad"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data.data_directory() == tmp_path / ".cache" / "forwardgrad"
    monkeypatch.setenv(files.VARIABLE, "~/shared")
    assert data.data_directory() == tmp_path / "shared"
    assert data.data_directory("given") == Path("given")


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_data_directory_that_is_missing_or_a_file(name, tmp_path):
    with pytest.raises(InputError, match=r"does not exist: create it, or give another with --data-dir or \$FORWARD"):
        data.find(name).load(tmp_path / "typo", offline=False)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"is a file: give a folder with --data-dir"):
        data.find(name).load(tmp_path / "file", offline=False)


@pytest.mark.parametrize("name", ["mnist", "cifar10"])
def test_data_directory_that_cannot_be_written(name, tmp_path):
    (tmp_path / name).touch()  # a file where a folder must be made
    with pytest.raises(InputError, match=r"cannot write to .*: give a writable data directory with --data-dir"):
        data.find(name).load(tmp_path, offline=False)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_data_directory_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match=r"cannot write to .*ermission denied.*--data-dir"):
        data.find("mnist").load(tmp_path, offline=False)


# ------------------------------------------------------------------------------------------------------------------ IDX


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">I{array.ndim}I", 2048 + array.ndim, *array.shape) + array.tobytes()


def fake_idx(folder: Path, packed: bool = True, **replaced: np.ndarray) -> tuple[idx.IdxFiles, dict[str, np.ndarray]]:
    """Four small files in `folder`, with their checksums and contents."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    arrays = {
        "train_images": rng.integers(0, 256, (6, 3, 2), np.uint8),
        "train_labels": rng.integers(0, 10, 6).astype(np.uint8),
        "test_images": rng.integers(0, 256, (4, 3, 2), np.uint8),
        "test_labels": rng.integers(0, 10, 4).astype(np.uint8),
        **replaced,
    }
    entries = {}
    for name, array in arrays.items():
        content = idx_bytes(array)
        zipped = gzip.compress(content)
        (folder / (f"{name}.gz" if packed else name)).write_bytes(zipped if packed else content)
        entries[name] = idx.IdxFile(name, packed=sha256(zipped), unpacked=sha256(content))
    return idx.IdxFiles(**entries), arrays


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_packed_and_unpacked(packed, tmp_path):
    expected_files, arrays = fake_idx(tmp_path / "set", packed)
    before = tree(tmp_path)
    x, y, x_test, y_test = idx.load(tmp_path / "set", expected_files, URL, offline=True)
    np.testing.assert_array_equal(x, arrays["train_images"][..., None])
    np.testing.assert_array_equal(y, arrays["train_labels"])
    np.testing.assert_array_equal(x_test, arrays["test_images"][..., None])
    np.testing.assert_array_equal(y_test, arrays["test_labels"])
    assert (x.dtype, y.dtype) == (np.uint8, np.int32)
    assert tree(tmp_path) == before  # so that a folder without write permission is fine


@pytest.mark.parametrize("packed", [True, False])
def test_idx_wrong_checksum(packed, tmp_path):
    expected_files, _ = fake_idx(tmp_path / "set", packed)
    path = tmp_path / "set" / ("test_images.gz" if packed else "test_images")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        InputError, match=r"test_images.* is not the canonical file .*SHA256 differs.*: delete it .*http://ex"
    ):
        idx.load(tmp_path / "set", expected_files, URL, offline=True)


@pytest.mark.parametrize("cut", [4, 12, -9, -1])
def test_idx_truncated_gzip(cut, tmp_path):
    zipped = gzip.compress(idx_bytes(np.arange(100, dtype=np.uint8)))[:cut]
    (tmp_path / "labels.gz").write_bytes(zipped)
    with pytest.raises(InputError, match=r"labels\.gz is not a whole gzip file .*: delete it and get it again"):
        idx.read(tmp_path, idx.IdxFile("labels", sha256(zipped), ""), URL)


def test_idx_garbage_after_gzip(tmp_path):
    zipped = gzip.compress(idx_bytes(np.arange(9, dtype=np.uint8))) + b"more"
    (tmp_path / "labels.gz").write_bytes(zipped)
    with pytest.raises(InputError, match=r"not a whole gzip file"):
        idx.read(tmp_path, idx.IdxFile("labels", sha256(zipped), ""), URL)


def test_idx_is_strict():
    good = idx_bytes(np.arange(6, dtype=np.uint8).reshape(2, 3))
    np.testing.assert_array_equal(idx.parse(good, Path("f")), [[0, 1, 2], [3, 4, 5]])
    for bad in (good[:-1], good + b"\0", good[:12]):
        with pytest.raises(
            InputError, match=r"f has \d+ bytes of data, and its header \[2, 3\] asks .*delete it and get"
        ):
            idx.parse(bad, Path("f"))
    floats, no_rank, huge = b"\0\0\x0d\x02" + good[4:], b"\0\0\x08\0", b"\0\0\x08\x01" + b"\xff" * 4
    for bad in (b"", good[:3], good[:11], b"\1" + good[1:], floats, no_rank):
        with pytest.raises(InputError, match=r"f is not an IDX file of bytes: delete it and get it again"):
            idx.parse(bad, Path("f"))
    with pytest.raises(InputError, match="asks for another number"):
        idx.parse(huge, Path("f"))


def test_idx_labels_of_other_images(tmp_path):
    expected_files, _ = fake_idx(tmp_path / "set", train_labels=np.zeros(5, np.uint8))
    with pytest.raises(InputError, match=r"do not belong together: images must be \[N, H, W\] and labels \[N\]"):
        idx.load(tmp_path / "set", expected_files, URL, offline=True)


def test_file_that_cannot_be_read(tmp_path):
    (tmp_path / "labels.gz").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*labels\.gz .*: make it a readable file"):
        idx.read(tmp_path, idx.IdxFile("labels", "sha256:0", ""), URL)


# -------------------------------------------------------------------------------------------------------------- pickles


class Harmful:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


def test_pickle_of_a_command_is_refused_and_not_executed(tmp_path):
    marker = tmp_path / "executed"
    content = pickle.dumps({"data": Harmful(marker)}, protocol=2)
    with pytest.raises(InputError, match=r"batch cannot be read \(\w+\.system is not allowed\): delete it .*http://ex"):
        pickles.unpickle(content, Path("batch"), URL)
    assert not marker.exists()
    with pytest.raises(KeyError):  # the same bytes do harm where nothing holds them back
        pickle.loads(content)["absent"]
    assert marker.exists()


def test_pickle_of_objects_is_refused():
    content = pickle.dumps({b"data": np.array([{}, []], object)}, protocol=4)
    with pytest.raises(InputError, match=r"an array of object is not allowed"):
        pickles.unpickle(content, Path("batch"), URL)
    with pytest.raises(InputError, match=r"builtins\.eval|__builtin__\.eval"):
        pickles.unpickle(b"c__builtin__\neval\n.", Path("batch"), URL)


def test_pickle_that_is_broken_or_no_dictionary():
    whole = pickle.dumps({b"data": 1})
    for bad in (b"", whole[:-1], b"not a pickle"):
        with pytest.raises(InputError, match=r"batch cannot be read .*delete it and get the canonical file from http"):
            pickles.unpickle(bad, Path("batch"), URL)
    with pytest.raises(InputError, match=r"batch holds no dictionary: delete it and get the canonical file"):
        pickles.unpickle(pickle.dumps([1]), Path("batch"), URL)


def test_pickle_of_an_array_as_python_2_wrote_it():
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x03\x85cnumpy\ndtype\n"
        b"U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x03abctb"
    )
    loaded = pickles.unpickle(b"\x80\x02}U\x04data" + array + b"s.", Path("batch"), URL)
    np.testing.assert_array_equal(loaded[b"data"], np.frombuffer(b"abc", np.uint8))


# -------------------------------------------------------------------------------------------------------- Tiny ImageNet

COLOURS = {"n03": (250, 10, 10), "n01": (10, 250, 10), "n02": (90, 90, 90)}  # the last class is stored grey


def fake_tiny_imagenet(folder: Path, size: tuple[int, int] = (4, 4)) -> Path:
    """Three classes, each of one colour: four training images of each and two validation images."""
    from PIL import Image

    def save(path: Path, name: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        colour, grey = COLOURS[name], name == "n02"
        Image.new("L" if grey else "RGB", size, colour[0] if grey else colour).save(path, "JPEG", quality=95)

    lines = []
    for i, name in enumerate(COLOURS):
        for j in range(4):
            save(folder / "train" / name / "images" / f"{name}_{j}.JPEG", name)
        for j in range(2):
            save(folder / "val" / "images" / f"val_{2 * i + j}.JPEG", name)
            lines.append(f"val_{2 * i + j}.JPEG\t{name}\t0\t0\t3\t3\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (folder / "words.txt").write_text("n01\tgreen, leaf\nn03\tred\nn99\tnot here\n")
    return folder


def test_tiny_imagenet_layout(tmp_path):
    folder = fake_tiny_imagenet(tmp_path / "set")
    before = tree(tmp_path)
    arrays = tiny_imagenet.read(folder, 3, (4, 4, 3))
    assert (arrays.train_images.shape, arrays.test_images.shape) == ((12, 4, 4, 3), (6, 4, 4, 3))
    assert (arrays.train_images.dtype, arrays.train_labels.dtype) == (np.uint8, np.int32)
    colours = np.array([COLOURS[name] for name in sorted(COLOURS)])  # classes are numbered in the order of their names
    for images, labels in (
        (arrays.train_images, arrays.train_labels),
        (arrays.test_images, arrays.test_labels),
    ):
        assert np.abs(images - colours[labels][:, None, None]).max() <= 4  # JPEG
    assert sorted(arrays.train_labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4
    assert arrays.train_labels.tolist() != sorted(arrays.train_labels.tolist()), "held-out images are of all classes"
    assert arrays.test_labels.tolist() == [1, 1, 0, 0, 2, 2]
    assert arrays.class_names == ("green, leaf", "n02", "red")
    np.testing.assert_array_equal(tiny_imagenet.read(folder, 3, (4, 4, 3)).train_labels, arrays.train_labels)
    assert tree(tmp_path) == before


def test_tiny_imagenet_that_is_not_whole(tmp_path):
    with pytest.raises(InputError, match=r"no tiny-imagenet-200 in .*: unpack http.* or name the folder .*--data-dir"):
        data.find("tiny-imagenet").load(tmp_path, offline=True)
    folder = fake_tiny_imagenet(tmp_path / tiny_imagenet.FOLDER)
    with pytest.raises(InputError, match=r"train has folders of 3 classes, not of 200: unpack .* again, all of it"):
        data.find("tiny-imagenet").load(tmp_path)
    read = lambda: tiny_imagenet.read(folder, 3, (4, 4, 3))
    first = folder / "train" / "n01" / "images" / "n01_0.JPEG"
    whole, lines = first.read_bytes(), folder / "val" / "val_annotations.txt"
    first.write_bytes(whole[:100])
    with pytest.raises(InputError, match=r"cannot read the image .*n01_0\.JPEG .*: unpack .* again"):
        read()
    first.write_bytes(whole)
    with pytest.raises(InputError, match=r"has 4 x 4 pixels, not 8 x 8: unpack"):
        tiny_imagenet.read(folder, 3, (8, 8, 3))
    kept = lines.read_text()
    for text, message in (
        (kept + "val_9.JPEG\tn98\t0\n", r"line 7 of .*annotations\.txt does not name an image and one of the classes"),
        (kept + "val_9.JPEG\tn01\t0\n", r"cannot read the image .*val_9\.JPEG \(No such file"),
        ("", r"annotations\.txt is empty: unpack"),
    ):
        lines.write_text(text)
        with pytest.raises(InputError, match=message):
            read()
    lines.unlink()
    with pytest.raises(InputError, match=r"cannot read .*val_annotations\.txt \(No such file.*: unpack"):
        read()
    for image in (folder / "train" / "n02" / "images").iterdir():
        image.unlink()
    with pytest.raises(InputError, match=r"no \*\.JPEG in .*n02.*: unpack"):
        read()


# ---------------------------------------------------------------------------------------------------------------- CIFAR


def fake_cifar(folder: Path, like: cifar.Release, **replaced: object) -> tuple[cifar.Release, dict[str, dict]]:
    """A small release in `folder`, of the same names as `like`, with its own checksums."""
    rng = np.random.default_rng(0)
    contents: dict[str, dict] = {}
    for name in [*like.train, *like.test]:
        labels = rng.integers(0, like.classes, 4).tolist()
        contents[name] = {b"data": rng.integers(0, 256, (4, 3072), np.uint8), like.labels_key: labels}
        contents[name][b"coarse_labels"] = [0] * 4
    for name in like.meta:
        contents[name] = {like.names_key: [f"kind {i}".encode() for i in range(like.classes)]}
    checksums = {}
    (folder / like.folder).mkdir(parents=True)
    for name, content in contents.items():
        written = pickle.dumps(replaced.get(name, content), protocol=4)
        (folder / like.folder / name).write_bytes(written)
        checksums[name] = sha256(written)
    parts = {part: {name: checksums[name] for name in getattr(like, part)} for part in ("train", "test", "meta")}
    return cifar.Release(**{**vars(like), **parts}), contents


def load_cifar(folder: Path, release: cifar.Release, offline: bool = True, url: str = URL) -> data.Arrays:
    return cifar.load(folder, release, (0.5,) * 3, (0.2,) * 3, offline=offline, url=url)


LAYOUTS = pytest.mark.parametrize("like", [cifar10.RELEASE, cifar100.RELEASE], ids=["cifar10", "cifar100"])


@LAYOUTS
def test_cifar_layout(like, tmp_path):
    release, contents = fake_cifar(tmp_path, like)
    before = tree(tmp_path)
    arrays = load_cifar(tmp_path, release)
    assert arrays.train_images.shape == (4 * len(release.train), 32, 32, 3)
    assert arrays.train_images.flags.c_contiguous
    assert (arrays.train_images.dtype, arrays.train_labels.dtype) == (np.uint8, np.int32)
    last, test = list(release.train)[-1], next(iter(release.test))
    row, column, channel = 5, 7, 2  # stored channel by channel
    stored = contents[last][b"data"][-1][channel * 1024 + row * 32 + column]
    assert arrays.train_images[-1, row, column, channel] == stored
    labels = [label for name in release.train for label in contents[name][release.labels_key]]
    assert arrays.train_labels.tolist() == labels
    assert arrays.test_labels.tolist() == contents[test][release.labels_key]
    assert arrays.class_names == tuple(f"kind {i}" for i in range(release.classes))
    assert arrays.classes == like.classes
    assert tree(tmp_path) == before


@LAYOUTS
def test_cifar_wrong_checksum_is_refused_before_unpickling(like, tmp_path, monkeypatch):
    release, _ = fake_cifar(tmp_path, like)
    name = next(iter(release.train))
    path = tmp_path / release.folder / name
    path.write_bytes(pickle.dumps({b"data": Harmful(tmp_path / "executed")}))
    monkeypatch.setattr(cifar, "unpickle", lambda *_: pytest.fail("unpickled before its checksum was known"))
    with pytest.raises(InputError, match=rf"{name} is not the canonical file .*: delete it and let it download again"):
        load_cifar(tmp_path, release)


@LAYOUTS
def test_cifar_harmful_pickle_of_the_right_checksum(like, tmp_path):
    name = next(iter(like.train))
    release, _ = fake_cifar(tmp_path, like, **{name: {b"data": Harmful(tmp_path / "executed")}})
    with pytest.raises(InputError, match=r"system is not allowed"):
        load_cifar(tmp_path, release)
    assert not (tmp_path / "executed").exists()


def test_cifar_wrong_contents(tmp_path):
    images, labels = np.zeros((4, 3072), np.uint8), [0, 1, 2, 3]
    for i, bad in enumerate(
        (
            {b"data": images.astype(np.int64), b"fine_labels": labels},
            {b"data": images[:, :-1], b"fine_labels": labels},
            {b"data": 0, b"fine_labels": labels},
            {b"data": images, b"fine_labels": labels[:3]},
            {b"data": images, b"fine_labels": [0, 1, 2, 100]},
            {b"data": images, b"fine_labels": [0, 1, 2, -1]},
            {b"data": images, b"fine_labels": [0.0] * 4},
        )
    ):
        release, _ = fake_cifar(tmp_path / str(i), cifar100.RELEASE, train=bad)
        with pytest.raises(
            InputError, match=r"train does not hold 32x32 colour images with labels below 100: delete it"
        ):
            load_cifar(tmp_path / str(i), release)
    release, _ = fake_cifar(tmp_path / "key", cifar100.RELEASE, train={b"data": images, b"labels": labels})
    with pytest.raises(InputError, match=r"train has no 'fine_labels': delete it and get the canonical file from"):
        load_cifar(tmp_path / "key", release)


# ------------------------------------------------------------------------------------------------------------- download


@pytest.fixture
def serve():
    """A function that serves a folder on this machine and returns its address."""
    servers = []

    def start(folder: Path, handler=http.server.SimpleHTTPRequestHandler) -> str:
        class Quiet(handler):
            def log_message(self, *args):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


class Breaking(http.server.SimpleHTTPRequestHandler):
    """Promises more than it sends."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"half of it")


def test_idx_download_of_what_is_missing(serve, tmp_path):
    expected_files, arrays = fake_idx(tmp_path / "server")
    here = files.cache_directory()  # does not exist yet: this one folder is made
    x, *_ = idx.load(here / "set", expected_files, serve(tmp_path / "server"), offline=False)
    np.testing.assert_array_equal(x[..., 0], arrays["train_images"])
    assert tree(here / "set") == tree(tmp_path / "server")
    idx.load(here / "set", expected_files, URL, offline=True)


def test_download_shows_its_progress_on_a_terminal(serve, tmp_path, monkeypatch, capfd):
    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setenv("FORCE_COLOR", "1")
    download.fetch(serve(tmp_path) + "file", tmp_path / "here" / "numbers", sha256(b"content"))
    printed = capfd.readouterr()
    assert "numbers" in printed.err
    assert printed.out == ""
    assert tree(tmp_path / "here") == {"numbers": b"content"}


def test_download_of_something_else_is_refused_and_removed(serve, tmp_path):
    (tmp_path / "file").write_bytes(b"other")
    target = tmp_path / "here" / "file"
    with pytest.raises(
        InputError, match=r"sent is not the canonical file \(its SHA256 differs\): try again later, or put"
    ):
        download.fetch(serve(tmp_path) + "file", target, sha256(b"content"))
    assert tree(tmp_path / "here") == {}


def test_download_that_breaks_off_leaves_nothing(serve, tmp_path):
    with pytest.raises(
        InputError, match=r"(cannot download|not the canonical file).*put the (canonical )?file at .*here"
    ):
        download.fetch(serve(tmp_path, Breaking) + "file", tmp_path / "here" / "file", sha256(b"content"))
    assert tree(tmp_path / "here") == {}


def test_download_that_is_interrupted_leaves_nothing(serve, tmp_path, monkeypatch):
    def interrupted(response, name):
        yield response.read(3)
        raise KeyboardInterrupt

    (tmp_path / "file").write_bytes(b"content")
    monkeypatch.setattr(download, "_progress", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.fetch(serve(tmp_path) + "file", tmp_path / "here" / "file", sha256(b"content"))
    assert tree(tmp_path / "here") == {}


def test_download_without_network_or_file(serve, tmp_path):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        for url in (address, serve(tmp_path)):
            with pytest.raises(InputError, match=rf"cannot download {url}file .*: check the network .*put the file at"):
                download.fetch(url + "file", tmp_path / "here" / "file", sha256(b"content"))
    assert tree(tmp_path / "here") == {}


def pack(folder: Path, release: cifar.Release, archive: Path, **replaced: bytes) -> cifar.Release:
    """Move the files of a release into an archive that holds unasked members too, some of them outside the folder."""
    inside = Path(release.folder).name
    with tarfile.open(archive, "w:gz") as tar:
        for name in release.files:
            path = folder / release.folder / name
            content = replaced.get(name, path.read_bytes())
            entry = tarfile.TarInfo(f"{inside}/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
            path.unlink()
        for name in (f"{inside}/unasked", "../outside", str(folder / "absolute")):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    return cifar.Release(**{**vars(release), "archive_checksum": sha256(archive.read_bytes())})


@LAYOUTS
def test_cifar_download_extracts_what_is_asked_and_no_more(like, serve, tmp_path):
    here, server = tmp_path / "here", tmp_path / "server"
    server.mkdir()
    release, contents = fake_cifar(here, like)
    expected = tree(here)
    release = pack(here, release, server / release.archive)
    arrays = load_cifar(here, release, offline=False, url=serve(server))
    assert arrays.test_labels.tolist() == contents[next(iter(like.test))][like.labels_key]
    assert tree(here) == expected
    assert tree(tmp_path).keys() == {f"here/{name}" for name in expected} | {f"server/{release.archive}"}


def test_cifar_archive_put_by_hand_serves_offline(tmp_path):
    release, _ = fake_cifar(tmp_path, cifar100.RELEASE)
    archive = tmp_path / "cifar100" / release.archive
    release = pack(tmp_path, release, archive)
    assert load_cifar(tmp_path, release).train_images.shape == (4, 32, 32, 3)
    assert archive.exists()


def test_cifar_broken_archives(tmp_path):
    release, _ = fake_cifar(tmp_path, cifar100.RELEASE)
    archive = tmp_path / "cifar100" / release.archive
    packed = pack(tmp_path, release, archive, test=b"another")
    with pytest.raises(
        InputError, match=r"test in .*tar\.gz is not the canonical file .*: delete it .*or get it from http"
    ):
        load_cifar(tmp_path, packed)
    assert not (tmp_path / release.folder / "test").exists()

    whole = archive.read_bytes()
    archive.write_bytes(whole[:-50])
    with pytest.raises(InputError, match=r"tar\.gz is not the canonical file"):
        load_cifar(tmp_path, packed)
    (tmp_path / release.folder / "train").unlink()
    for content in (whole[: len(whole) // 2], b"no archive", b"", gzip.compress(b"no tar")):
        archive.write_bytes(content)
        broken = cifar.Release(**{**vars(packed), "archive_checksum": sha256(content)})
        with pytest.raises(
            InputError, match=r"cannot extract .*: check the free space, or delete it and get it from http"
        ):
            load_cifar(tmp_path, broken)
        assert not (tmp_path / release.folder / "train").exists()


# ------------------------------------------------------------------------------------------------------------------ npz


def own(tmp_path: Path, **replaced: np.ndarray) -> str:
    """A file of the user's own arrays; `None` leaves a key out. Returns the name of the data set."""
    rng = np.random.default_rng(0)
    arrays = {
        "x_train": rng.integers(0, 256, (8, 4, 5, 3), np.uint8),
        "y_train": np.arange(8) % 3,
        "x_test": rng.integers(0, 256, (6, 4, 5, 3), np.uint8),
        "y_test": np.arange(6) % 3,
        **replaced,
    }
    np.savez(tmp_path / "own.npz", **{key: array for key, array in arrays.items() if array is not None})
    return f"npz:{tmp_path / 'own.npz'}"


def test_npz_bytes(tmp_path):
    dataset = data.find(own(tmp_path))
    assert (dataset.shape, dataset.classes) == ((4, 5, 3), 3)
    arrays = dataset.load(tmp_path / "not there", offline=True)
    assert (arrays.train_images.dtype, arrays.train_labels.dtype, arrays.scale) == (np.uint8, np.int32, 255)
    out = np.asarray(arrays.normalise(arrays.train_images), np.float64)
    np.testing.assert_allclose(out.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(out.std((0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_npz_floats_without_channels(dtype, tmp_path):
    images = np.random.default_rng(0).normal(3, 2, (2500, 4, 5)).astype(dtype)
    name = own(tmp_path, x_train=images, y_train=np.arange(2500) % 3, x_test=images[:6])
    arrays = data.find(name).load(tmp_path, offline=True)
    assert arrays.train_images.shape == (2500, 4, 5, 1)
    assert (arrays.train_images.dtype, arrays.scale) == (np.float32, 1)
    np.testing.assert_allclose(arrays.mean, np.float64(images).mean(), rtol=1e-6)
    np.testing.assert_allclose(arrays.std, np.float64(images).std(), rtol=1e-6)


def test_npz_constant_channel_is_finite(tmp_path):
    images = np.random.default_rng(0).normal(size=(8, 4, 5, 2))
    images[..., 1] = 0.1
    arrays = data.find(own(tmp_path, x_train=images, x_test=images[:6])).load(tmp_path, offline=True)
    np.testing.assert_allclose(arrays.normalise(images)[..., 1], 0, atol=1e-6)


X = np.zeros((8, 4, 5), np.uint8)
NPZ_ERRORS = {
    "missing keys": ({"x_test": None, "y_test": None}, r"has no x_test, y_test: write x_train, .* with numpy.savez"),
    "objects": ({"y_train": np.array([{}] * 8, object)}, r"holds Python objects: save arrays of numbers"),
    "rank": ({"x_train": X[0]}, r"x_train has shape \[4, 5\]: save images as \[N, H, W\] or \[N, H, W, C\]"),
    "empty": ({"x_test": X[:0]}, r"x_test has shape \[0, 4, 5\]: save images as .* not empty"),
    "type": ({"x_train": X.astype(np.int64)}, r"x_train is int64: save images as uint8 .* or as floats"),
    "not finite": (
        {"x_train": np.full((8, 4, 5), np.nan)},
        r"x_train holds values that are not finite .*: remove or rep",
    ),
    "too large": ({"x_train": np.full((8, 4, 5), 1e300)}, r"x_train holds values that are not finite in float32"),
    "size": ({"x_test": X[:6, :3]}, r"x_test .*\[6, 3, 5, 1\] .* differ in kind: save images of one size and one type"),
    "mixed": ({"x_test": np.zeros((6, 4, 5, 3))}, r"float32.* uint8.* differ in kind: save images of one size and one"),
    "lengths": ({"y_train": np.arange(7)}, r"7 labels in y_train for 8 images in x_train: save one label per image"),
    "float labels": ({"y_test": np.ones(6)}, r"y_test is float64\[6\]: save labels as integers \[N\], counted from 0"),
    "one-hot labels": ({"y_test": np.ones((6, 3), int)}, r"y_test is int64\[6, 3\]: save labels as integers \[N\]"),
    "negative": (
        {"y_train": np.arange(8) - 1},
        r"y_train holds the negative label -1: save labels as integers counted",
    ),
    "one class": ({"y_train": np.zeros(8, int), "y_test": np.zeros(6, int)}, r"labels up to 0 .* two or more of them"),
    "far labels": (
        {"y_test": np.full(6, 2**40)},
        r"labels up to 1099511627776 on 8 training images: number the classes",
    ),
}


@pytest.mark.parametrize("case", NPZ_ERRORS)
def test_npz_errors(case, tmp_path):
    replaced, message = NPZ_ERRORS[case]
    with pytest.raises(InputError, match=rf"own\.npz.*{message}"):
        data.find(own(tmp_path, **replaced))


def test_npz_of_another_kind(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*none\.npz: after npz: comes the path of a file"):
        data.find(f"npz:{tmp_path / 'none.npz'}")
    with pytest.raises(InputError, match=r"there is no file"):
        data.find("npz:")
    np.save(tmp_path / "one.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"one\.npy holds a single array: write x_train, .* with numpy\.savez"):
        npz.from_file(tmp_path / "one.npy")
    whole = Path(own(tmp_path).removeprefix("npz:")).read_bytes()
    damaged = bytearray(whole)
    damaged[200] ^= 1
    harmful = pickle.dumps(Harmful(tmp_path / "executed"))
    for content in (b"", b"text", harmful, whole[:-100], whole[:200], damaged):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(InputError, match=r"bad\.npz cannot be read as an npz file: write .* with numpy\.savez"):
            npz.from_file(tmp_path / "bad.npz")
    assert not (tmp_path / "executed").exists()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        for key in ("x_train", "y_train", "x_test", "y_test"):
            other.writestr(key, "text")
    with pytest.raises(InputError, match=r"other\.zip is a zip file of something other than arrays: write"):
        npz.from_file(tmp_path / "other.zip")


# -------------------------------------------------------------------------------------------------------------- batches


def test_epoch_order_is_a_fixed_permutation():
    order = batches.epoch_order(3, 1, 100)
    assert order.dtype == np.int32
    assert sorted(order) == list(range(100))
    np.testing.assert_array_equal(order, batches.epoch_order(3, 1, 100))
    assert (order != batches.epoch_order(3, 2, 100)).any()
    assert (order != batches.epoch_order(4, 1, 100)).any()
    assert batches.epoch_order(0, 0, 8).tolist() == [0, 3, 7, 5, 1, 2, 6, 4]  # the same on every machine and version
    assert batches.epoch_order(2**70, 2**40, 5).shape == (5,)


def test_steps_are_resumable_anywhere():
    whole = batches.step_indices(seed=5, first_step=0, count=23, n=50, batch_size=8)
    assert whole.shape == (23, 8)
    assert whole.dtype == np.int32
    for first in range(24):
        for count in {0, 1, 7, 23 - first} & set(range(24 - first)):
            part = batches.step_indices(seed=5, first_step=first, count=count, n=50, batch_size=8)
            np.testing.assert_array_equal(part, whole[first : first + count])


@pytest.mark.parametrize(("n", "batch_size"), [(48, 8), (50, 8), (5, 5), (5, 1)])
def test_no_example_comes_twice_in_an_epoch(n, batch_size):
    per_epoch = batches.steps_per_epoch(n, batch_size)
    assert per_epoch == n // batch_size
    whole = batches.step_indices(0, 0, 3 * per_epoch, n, batch_size).reshape(3, -1)
    for epoch in range(3):
        assert len(set(whole[epoch])) == per_epoch * batch_size
        np.testing.assert_array_equal(whole[epoch], batches.epoch_order(0, epoch, n)[: per_epoch * batch_size])


@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (12, 4), (3, 8), (1, 1)])
def test_evaluation_covers_each_example_once(n, batch_size):
    indices, weight = batches.evaluation_batches(n, batch_size)
    assert indices.shape == weight.shape == (-(-n // batch_size), batch_size)
    assert (indices.dtype, weight.dtype) == (np.int32, np.float32)
    assert indices[weight == 1].tolist() == list(range(n))
    assert set(weight[weight != 1]) <= {0}
    assert indices.min() >= 0
    assert indices.max() < n


@pytest.mark.parametrize("batch_size", [-1, 0, 11])
def test_impossible_batches(batch_size):
    with pytest.raises(
        InputError, match=rf"no batch of {batch_size} .* from 10 examples: choose a batch size from 1 to 10"
    ):
        batches.step_indices(0, 0, 1, 10, batch_size)


def test_impossible_steps_seeds_and_evaluations():
    with pytest.raises(InputError, match=r"no 1 steps can start at step -1: count both from 0"):
        batches.step_indices(0, -1, 1, 10, 2)
    with pytest.raises(InputError, match=r"the seed -1 is negative: choose 0 or a larger number"):
        batches.step_indices(-1, 0, 1, 10, 2)
    for n, batch_size in ((0, 4), (4, 0)):
        with pytest.raises(
            InputError, match=rf"no batches of {batch_size} .* of {n} examples: both must be at least 1"
        ):
            batches.evaluation_batches(n, batch_size)


# -------------------------------------------------------------------------------------------------------------- augment


def numbered(dtype, n=600) -> np.ndarray:
    """Images `[n, 4, 5, 2]` without two equal pixels in any."""
    return np.broadcast_to(np.arange(1, 41).reshape(4, 5, 2), (n, 4, 5, 2)).astype(dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_flip_mirrors_half_of_the_images_whole(dtype):
    images, key = numbered(dtype), jax.random.key(0)
    out = jax.jit(augment.flip)(key, images)
    assert out.dtype == dtype
    same = (np.asarray(out) == images).all((1, 2, 3))
    mirrored = (np.asarray(out) == images[:, :, ::-1]).all((1, 2, 3))
    assert (same ^ mirrored).all()
    assert abs(mirrored.mean() - 0.5) < 4 * 0.5 / np.sqrt(len(images))
    np.testing.assert_array_equal(out, augment.flip(key, images))
    assert (out != augment.flip(jax.random.key(1), images)).any()


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_crops_are_all_the_shifts(dtype):
    images, key, pad = numbered(dtype), jax.random.key(0), 2
    out = jax.jit(augment.pad_and_crop, static_argnums=2)(key, images, pad)
    assert out.shape == images.shape
    assert out.dtype == dtype
    padded = np.pad(images[0], ((pad, pad), (pad, pad), (0, 0)))
    shifts = [padded[i : i + 4, j : j + 5].tobytes() for i in range(5) for j in range(5)]
    found = [bytes(np.asarray(image).tobytes()) for image in out]
    assert set(found) == set(shifts)
    np.testing.assert_array_equal(out, augment.pad_and_crop(key, images, pad))
    np.testing.assert_array_equal(augment.pad_and_crop(key, images, 0), images)


def test_negative_border():
    with pytest.raises(InputError, match=r"a border of -1 pixels cannot be added: choose 0 or more"):
        augment.pad_and_crop(jax.random.key(0), jnp.zeros((1, 2, 2, 1)), -1)


# ------------------------------------------------------------------------------------------------------- the real files

MNIST_TRAIN = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
MNIST_TEST = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
REAL_COUNTS = {
    "mnist": (MNIST_TRAIN, MNIST_TEST),
    "fashion-mnist": ([6000] * 10, [1000] * 10),
    "cifar10": ([5000] * 10, [1000] * 10),
    "cifar100": ([500] * 100, [100] * 100),
}


@pytest.mark.skipif(not REAL, reason=f"${files.VARIABLE} is not set")
@pytest.mark.parametrize("name", REAL_COUNTS)
def test_the_real_files(name):
    folder = Path(str(REAL))
    if not (folder / re.sub("-", "_", name)).is_dir():
        pytest.skip(f"no {name} in ${files.VARIABLE}")
    dataset = data.find(name)
    arrays = dataset.load(folder, offline=True)
    train, test = REAL_COUNTS[name]
    assert np.bincount(arrays.train_labels).tolist() == train
    assert np.bincount(arrays.test_labels).tolist() == test
    assert arrays.train_images.shape == (sum(train), *dataset.shape)
    assert arrays.test_images.shape == (sum(test), *dataset.shape)
    assert len(arrays.class_names) == arrays.classes == dataset.classes
    mean, _ = npz._moments(arrays.train_images, arrays.scale)
    np.testing.assert_allclose(arrays.mean, mean, atol=1e-3)


@pytest.mark.skipif(not REAL, reason=f"${files.VARIABLE} is not set")
def test_the_checksums_of_unpacked_files(tmp_path):
    source = Path(str(REAL)) / "mnist"
    if not source.is_dir():
        pytest.skip(f"no mnist in ${files.VARIABLE}")
    (tmp_path / "mnist").mkdir()
    for file in mnist.FILES:
        (tmp_path / "mnist" / file.name).write_bytes(gzip.decompress((source / f"{file.name}.gz").read_bytes()))
    assert data.find("mnist").load(tmp_path, offline=True).train_images.shape == (60000, 28, 28, 1)
