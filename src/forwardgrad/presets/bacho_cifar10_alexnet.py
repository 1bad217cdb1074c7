"""AlexNet of Bacho & Chu 2023 on CIFAR-10 at its 32 pixels: 100 epochs of Adam, lr 1e-4 times 0.95 an epoch. In no table; for trying AlexNet out.

Batch 64, pixels in [-1, 1], no augmentation; PyTorch's initial weights and BatchNorm after every layer, as the released code has them. The first
convolution is one for small images instead of the published one (see `models.alexnet`). Methods with local losses need --local-heads, those that keep
examples apart --batch-norm none.
"""

import dataclasses

from forwardgrad.models.alexnet import AlexNet
from forwardgrad.presets.bacho_mnist_fc import preset as mnist

preset = dataclasses.replace(mnist, model=AlexNet(batch_norm="all", init="torch", local_heads=False), dataset="cifar10")
