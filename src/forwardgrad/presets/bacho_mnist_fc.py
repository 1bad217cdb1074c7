"""Bacho & Chu 2023, fully connected networks on MNIST (Tables 1 and B.6, Figures 4 to 7): 100 epochs of Adam, lr 1e-4 times 0.95 an epoch.

The network of Figure 7, "five layers": four hidden layers of 800 units and the output. `--hidden 800`, `--hidden 800 800` and
`--hidden 800 800 800` are the tables' networks of two to four layers. Batch 64 (of the released code; the paper is silent), pixels in [-1, 1], no
augmentation; activations are displaced after the ReLU, all of them (--no-mask), along signs as everywhere here, not the paper's Gaussians, which
`reproduce` draws (--guess gaussian). An epoch of the five-layer network takes 16 seconds of a CPU core's
time by `bp`, 22 by `fdfa`.

As in the released code, from which the published cells of `bp`, `dfa`, `dkp` and `fdfa` presumably come, BatchNorm follows every hidden layer and
weights start as PyTorch draws them; the paper has no BatchNorm here and uniform Kaiming weights (--no-batch-norm --init kaiming-uniform). `fg-w` ran
without BatchNorm, since its code runs no other network, and with the output layer perturbed (--output layer). No code of `fg-a` and `lg-fg-a` was
released; they keep examples apart and are unbiased without: --no-batch-norm. The linear heads of `lg-fg-a` are after every hidden layer but the last,
whose loss is the network's.
"""

from forwardgrad.models.mlp import MLP
from forwardgrad.presets.experiment import Experiment

preset = Experiment(
    model=MLP(hidden=(800, 800, 800, 800), batch_norm=True, taps="after", init="torch"),
    dataset="mnist",
    method="fdfa",
    epochs=100,
    batch_size=64,
    lr=1e-4,
    schedule="exponential",
    decay=0.95,
    optimizer="adam",
    mask=False,
    pixels="symmetric",
)
