"""Ren et al. 2023, CIFAR-10, supervised, LocalMixer M/8/16: 200 epochs, batch 128, SGD lr 0.01 falling linearly, momentum 0.9, no augmentation.

From appendix 11 and, where the paper is silent, the released code: weight decay 1e-4, final classifier at a tenth of the gradient and zero at
first, initial weights capped at 0.1. The paper says no augmentation; its released code flips training images always (--flip). Table 3 drew
Gaussian noise (--guess gaussian); here Rademacher is the default. Microbatches of 8 suit a CPU (the result does not depend on them); on a GPU use
--microbatch 0.
"""

from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.presets.experiment import Experiment

preset = Experiment(
    model=LocalMixer(blocks=4, patches=8, channels=512, groups=16, init_cap=0.1, zero_classifier=True),
    dataset="cifar10",
    epochs=200,
    batch_size=128,
    lr=0.01,
    weight_decay=1e-4,
    classifier_lr=0.1,
    microbatch=8,
)
