"""Bacho & Chu 2023, fully connected networks on Fashion-MNIST (Tables 1 and B.6): 100 epochs of Adam, lr 1e-4 times 0.95 an epoch.

As `bacho-mnist-fc` in everything but the data, with BatchNorm and without for the same methods. The default is the tables' two-layer network;
`--hidden 800 800` and `--hidden 800 800 800` are those of three and four layers.
"""

import dataclasses

from forwardgrad.models.mlp import MLP
from forwardgrad.presets.bacho_mnist_fc import preset as mnist

preset = dataclasses.replace(
    mnist, model=MLP(hidden=(800,), batch_norm=True, taps="after", init="torch"), dataset="fashion-mnist"
)
