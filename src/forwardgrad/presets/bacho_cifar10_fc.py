"""Bacho & Chu 2023, fully connected networks on CIFAR-10 (Tables 1 and B.6, Figure 3): 100 epochs of Adam, lr 1e-4 times 0.95 an epoch.

As `bacho-mnist-fc` in everything but the data and the width, with BatchNorm and without for the same methods (the released code of `fg-w` does
not run here; the paper has its number all the same). The default is the tables' two-layer network of 1000 hidden units; `--hidden 1000 1000` and
`--hidden 1000 1000 1000` are those of three and four layers.
"""

import dataclasses

from forwardgrad.models.mlp import MLP
from forwardgrad.presets.bacho_mnist_fc import preset as mnist

preset = dataclasses.replace(
    mnist, model=MLP(hidden=(1000,), batch_norm=True, taps="after", init="torch"), dataset="cifar10"
)
