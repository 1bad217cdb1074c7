"""Bacho & Chu 2023, Table 2, the small convolutional network on MNIST: 100 epochs of Adam, lr 1e-4 times 0.95 an epoch.

Batch 64, pixels in [-1, 1], no augmentation. Fashion-MNIST and CIFAR-10, the table's other columns (and Figure 3): `--dataset fashion-mnist`,
`--dataset cifar10`. An epoch of MNIST takes 70 seconds of a CPU core's time by `bp`, 110 by `fdfa`.

The network is the released code's, 15C5-40C5-P2-128-10 with BatchNorm after every hidden layer and PyTorch's initial weights; activations are
displaced after the ReLU and before the pooling. The paper writes 15C5-P2-40C5-P2-128-10, without BatchNorm and with uniform Kaiming weights:
--pool-all --no-batch-norm --init kaiming-uniform. The published cells of `bp`, `dfa`, `dkp` and `fdfa` presumably come from that code, with
BatchNorm. No code of `fg-w`, `fg-a` and `lg-fg-a` was released for this network: run them with --no-batch-norm, where they are unbiased.
"""

import dataclasses

from forwardgrad.models.cnn import CNN
from forwardgrad.presets.bacho_mnist_fc import preset as mnist

preset = dataclasses.replace(mnist, model=CNN(init="torch"))
