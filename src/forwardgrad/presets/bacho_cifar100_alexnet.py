"""Bacho & Chu 2023, Table 3, AlexNet on CIFAR-100: 100 epochs of Adam, lr 1e-4 times 0.95 an epoch. For a GPU.

Batch 64, pixels in [-1, 1], images scaled to 224 pixels as in the released code (the paper is silent; --resize 0: 32 pixels). No augmentation, as
the paper says; the released code crops at random scales and flips. Initial weights are PyTorch's, as in the code.

BatchNorm after every layer, as in the code that the published cells of `bp`, `dfa`, `dkp` and `fdfa` come from; the paper names the convolutions
alone (--batch-norm convolutions). No code of `fg-w`, `fg-a` and `lg-fg-a` was released for AlexNet; with --batch-norm none they are unbiased, and
`lg-fg-a` needs --local-heads.
"""

import dataclasses

from forwardgrad.models.alexnet import AlexNet
from forwardgrad.presets.bacho_mnist_fc import preset as mnist

preset = dataclasses.replace(
    mnist, model=AlexNet(resize=224, batch_norm="all", init="torch", local_heads=False), dataset="cifar100"
)
