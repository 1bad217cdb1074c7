"""Bacho & Chu 2023, Table 3, AlexNet on Tiny ImageNet 200: 100 epochs of Adam, lr 1e-4 times 0.95 an epoch. For a GPU.

As `bacho-cifar100-alexnet` in everything but the data: images scaled to 224 pixels (--resize 0: 64 pixels), no augmentation, BatchNorm and
without for the same methods. No code for this data set was released.
"""

import dataclasses

from forwardgrad.presets.bacho_cifar100_alexnet import preset as cifar100

preset = dataclasses.replace(cifar100, dataset="tiny-imagenet")
