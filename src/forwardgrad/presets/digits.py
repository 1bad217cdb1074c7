"""scikit-learn's handwritten digits (8 x 8 pixels, embedded): the smallest task on which every method can be seen to learn.

LocalMixer with 3 blocks, 2 x 2 patches, 128 channels, 8 groups. Reproduces no paper; runs in about half a minute on two cores.
"""

from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.presets.experiment import Experiment

preset = Experiment(
    model=LocalMixer(blocks=3, patches=2, channels=128, groups=8, init_cap=0.1, zero_classifier=True),
    dataset="digits",
    epochs=60,
    batch_size=32,
    lr=0.03,
    weight_decay=1e-4,
    classifier_lr=0.1,
)
