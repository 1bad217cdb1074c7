"""scikit-learn's handwritten digits (8 x 8 pixels, embedded): the smallest task on which every method can be seen to learn.

LocalMixer with 3 blocks, 2 x 2 patches, 128 channels, 8 groups. Reproduces no paper; runs in about half a minute on two cores.

Place of normalisation and weight decay were chosen on 300 held-out training images (4 seeds). Images have blank patches: normalised before the first
layer they are zero, its output there is the bias alone, and normalising that, which starts at zero, multiplies by 1/sqrt(1e-5) = 316. In
one seed of four `lg-fa` and `lg-fg-a` drove that bias to several hundred and never recovered; normalised after the layers alone, none did. Weight
decay helps weights to align with random feedback: `lg-fa` errs by 5.9 % of the held-out images with 1e-4, and by 2.3 % with 1e-2.
"""

from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.presets.experiment import Experiment

preset = Experiment(
    model=LocalMixer(
        blocks=3, patches=2, channels=128, groups=8, norm_place="after", init_cap=0.1, zero_classifier=True
    ),
    dataset="digits",
    epochs=60,
    batch_size=32,
    lr=0.03,
    weight_decay=1e-2,
    classifier_lr=0.1,
)
