"""Ren et al. 2023, Table 3, MNIST, LocalMixer M/1/16: 1000 epochs, batch 128, SGD lr 0.01 falling linearly, momentum 0.9, no augmentation.

From appendix 11 and, where the paper is silent, the released code: weight decay 1e-4, final classifier at a tenth of the gradient and zero at
first, initial weights capped at 0.1. Table 3 drew Gaussian noise (--guess gaussian); here Rademacher is the default.
"""

from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.presets.experiment import Experiment

preset = Experiment(
    model=LocalMixer(blocks=1, patches=1, channels=512, groups=16, init_cap=0.1, zero_classifier=True),
    dataset="mnist",
    epochs=1000,
    batch_size=128,
    lr=0.01,
    weight_decay=1e-4,
    classifier_lr=0.1,
)
