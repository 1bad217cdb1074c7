"""Bacho & Chu 2023, Table 3, AlexNet on CIFAR-100: 100 epochs of Adam, lr 1e-4 times 0.95 an epoch. For a GPU.

Batch 64, pixels in [-1, 1], images scaled to 224 pixels as in the released code (the paper is silent; --resize 0: 32 pixels). No augmentation, as
the paper says; the released code crops at random scales and flips. Initial weights are PyTorch's, as in the code.

BatchNorm after every layer, as in the code (whose example for AlexNet has batches of 128); the paper names the convolutions alone
(--batch-norm convolutions). Network from the code and no augmentation from the paper is a mixture that neither may have run. No code of `fg-w`,
`fg-a` and `lg-fg-a` was released for AlexNet; the latter two are unbiased with --batch-norm none, and `lg-fg-a` needs --local-heads.
"""

import dataclasses

from forwardgrad.models.alexnet import AlexNet
from forwardgrad.presets.bacho_mnist_fc import preset as mnist

preset = dataclasses.replace(
    mnist, model=AlexNet(resize=224, batch_norm="all", init="torch", local_heads=False), dataset="cifar100"
)
