"""An experiment: everything that decides a training run's numbers. Field docstrings are the help texts of the command line."""

from __future__ import annotations

import dataclasses
from typing import Any, Generic, Literal, TypeVar

from forwardgrad import models, recipes
from forwardgrad.engine import Estimator
from forwardgrad.errors import InputError, unknown
from forwardgrad.guesses import random
from forwardgrad.network import Network, in_precision

M = TypeVar("M")

GUESSES = {"rademacher": random.rademacher, "gaussian": random.gaussian, "orthogonal": random.orthogonal}

OPTIONS = {
    "guess": "guess",
    "draws": "draws",
    "mask": "mask",
    "losses": "losses",
    "norm_gradient": "norm_gradient",
    "variant": "released",
    "feedback_rule": "rule",
    "feedback_lr": "feedback_lr",
    "feedback_decay": "feedback_decay",
    "feedback_rank": "feedback_rank",
    "alpha": "alpha",
    "perturbed": "perturbed",
    "predictor": "predictor",
    "predictor_rate": "predictor_rate",
    "token_by": "token_by",
}
"""Fields that are the method's own: the name of each among the recipes' arguments. A method takes those that its recipe has."""

NEEDS = {
    "decay": ("schedule", ("exponential",)),
    "momentum": ("optimizer", ("sgd",)),
    "feedback_lr": ("feedback_rule", ("adam", "sgd")),
    "alpha": ("feedback_rule", ("average",)),
    "predictor_rate": ("predictor", ("fitted", "average")),
}
"""Fields that have an effect only where another has one of some values."""


@dataclasses.dataclass(frozen=True)
class Experiment(Generic[M]):
    """A training run, fully resolved."""

    model: M
    """the network"""
    dataset: str = "digits"
    """data set: a name from `forwardgrad list datasets`, or npz:FILE for your own arrays"""
    method: str = "lg-fg-a"
    """a name from `forwardgrad list methods`"""
    epochs: int = 20
    """passes over the training images"""
    batch_size: int = 128
    """examples per step"""
    lr: float = 0.01
    """learning rate at its highest"""
    schedule: Literal["linear", "cosine", "step", "exponential", "constant"] = "linear"
    """learning rate over time: to zero in a straight line or half a cosine; times 0.1 at 50 % and 80 % of the steps; times --decay after every
    epoch; constant"""
    decay: float = 0.95
    """exponential schedule only: factor on the learning rate after every epoch"""
    warmup_epochs: float = 0.0
    """epochs over which the learning rate first rises from zero"""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """sgd with momentum, or Adam"""
    momentum: float = 0.9
    """momentum of sgd"""
    weight_decay: float = 0.0
    """coupled L2: this times the weights is added to their gradient; biases are left out"""
    classifier_lr: float = 1.0
    """factor on the gradient of the final classifier, before weight decay"""
    guess: Literal["rademacher", "gaussian", "orthogonal"] = "rademacher"
    """random directions, for methods that draw any"""
    draws: int = 1
    """directions per step, averaged"""
    mask: bool = True
    """no perturbation, and no feedback, for units that their ReLU switches off; for methods that perturb or credit activations"""
    losses: Literal["block+patch+group", "block+patch", "block", "patch+group", "global"] = "block+patch+group"
    """lg-fg-a only: where losses are. Without `block` there is the last block's alone, or, with `global`, the final one; `patch+group` is biased"""
    norm_gradient: bool = True
    """lg-fg-a only; False: credit the linear layers' outputs, skipping the Jacobian of the normalisation after them; biased,
    needs --allow-bias"""
    variant: Literal["paper", "released"] = "paper"
    """fg-a, fa, l-fa, lg-fa, dfa: as in the paper, or as the code released with Ren et al. 2023 computes what it calls so"""
    feedback_rule: Literal["adam", "average", "sgd"] = "adam"
    """what moves learned feedback matrices: adam or average (with rate alpha) for fdfa and fg-a-fdfa, adam or sgd for dkp"""
    feedback_lr: float = 1e-4
    """dkp, fdfa, fg-a-fdfa only: learning rate of the feedback matrices, the same at every step; the rule average has alpha"""
    feedback_decay: float = 0.0
    """dkp only: this times the feedback matrices is added to their gradient"""
    feedback_rank: int = 0
    """dkp, fdfa, fg-a-fdfa, dfa only: feedback matrices as products of two factors of this rank, for many classes; 0: whole"""
    alpha: float = 1e-3
    """fdfa, fg-a-fdfa only: rate of the moving average of the feedback matrices, where it is their rule"""
    perturbed: Literal["hidden", "all"] = "hidden"
    """lg-fg-a-plus only: perturb all taps, or leave out those right below each local loss, whose layer is then exact"""
    predictor: Literal["fitted", "average", "random", "local", "ntk", "mirror", "none"] = "fitted"
    """lg-fg-a-plus only: control variate: feedback fitted to the tangents, its moving average as in fdfa, random feedback; local, ntk, mirror,
    which go back through a block: the gradient of its own loss, of one through a random readout, or through weights that tangents
    have taught; none"""
    predictor_rate: float = 0.4
    """lg-fg-a-plus only: rate at which the predictors fitted and average learn; average wants less, about 0.02"""
    token_by: Literal["fewest", "weights", "activities", "together"] = "fewest"
    """lg-fg-a-plus only: what of token mixing is perturbed, in a tangent of its own: its weights, for each example and output patch, its
    outputs, or the fewer of the two; together: its outputs, in the tangent of all others"""
    pixels: Literal["standardised", "symmetric"] = "standardised"
    """inputs: each colour less its mean over the training images, divided by its standard deviation; or scaled to [-1, 1]"""
    flip: bool = False
    """flip training images left to right at random"""
    crop: int = 0
    """pad training images by this many pixels and crop at random"""
    microbatch: int | Literal["auto"] = 0
    """examples worked on at a time, a divisor of the batch size; 0: the whole batch; auto: the fastest, measured once for this machine and
    remembered. Changes time and memory, not the result"""
    precision: Literal["float32", "bfloat16"] = "float32"
    """of activations, their tangents and perturbations; parameters, losses and gradients are float32"""
    executor: Literal["auto", "whole", "streamed"] = "auto"
    """run the network as a whole, or one block at a time with memory that does not grow with depth; the result is the same. auto: streamed
    where that costs no time"""
    seed: int = 0
    """of initial weights, batches, noise and augmentation"""
    train_images: int = 0
    """use only the first N training images, after those for validation are held out; 0: all"""
    validation: int = 0
    """hold out the last N training images and report on them instead of the test set"""
    allow_bias: bool = False
    """run although the expected estimate is not the gradient; the run reports the relative bias"""

    def estimator(self, network: Network) -> Estimator:
        """The method for a network, with those of `OPTIONS` that it takes.

        Raises:
          InputError: unknown method, or one that the network cannot serve.
        """
        recipe = recipes.find(self.method)
        values = {name: getattr(self, field) for field, name in OPTIONS.items() if name in recipe.options}
        made = {"guess": GUESSES[self.guess](), "released": self.variant == "released"}
        if self.precision != "float32":
            network = in_precision(network, self.precision)
        method = recipe(network, **{name: made.get(name, value) for name, value in values.items()})
        return dataclasses.replace(
            method,
            allow_bias=self.allow_bias,
            microbatch=None if self.microbatch == "auto" else self.microbatch or None,
            executor=self.executor,
        )

    def idle(self, field: str) -> str:
        """Why a field has no effect on this run, in words; empty where it may have."""
        if field in OPTIONS and OPTIONS[field] not in recipes.find(self.method).options:
            return f"is no option of {self.method}"
        if field in NEEDS:
            other, values = NEEDS[field]
            if getattr(self, other) not in values:
                return f"needs --{other.replace('_', '-')} {' or '.join(values)}"
        return ""

    def check(self) -> None:
        """Refuse values that cannot train.

        Raises:
          InputError: which field, and what it may be.
        """
        for name, least in (
            ("epochs", 1),
            ("batch_size", 1),
            ("draws", 1),
            ("validation", 0),
            ("train_images", 0),
            ("crop", 0),
            ("seed", 0),
            ("feedback_rank", 0),
            *(() if self.microbatch == "auto" else (("microbatch", 0),)),
        ):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise InputError(f"--{flag} must be at least {least}, not {getattr(self, name)}.")
        for name, most in (("seed", 2**32 - 1), ("epochs", 10**6)):
            if getattr(self, name) > most:
                raise InputError(f"--{name} must be at most {most}, not {getattr(self, name)}.")
        for name in ("lr", "feedback_lr", "alpha", "decay", "predictor_rate"):
            if not getattr(self, name) > 0:
                raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(self, name)}.")
        for name in ("weight_decay", "feedback_decay", "warmup_epochs", "momentum", "classifier_lr"):
            if not getattr(self, name) >= 0:
                raise InputError(f"--{name.replace('_', '-')} must not be negative, and is {getattr(self, name)}.")
        if self.alpha > 1:
            raise InputError(f"--alpha is the weight of what is new in an average: at most 1, not {self.alpha}.")
        if 0 < self.train_images < self.batch_size:
            raise InputError(
                f"{self.train_images} training images are less than a batch of {self.batch_size}: set --train-images to at least that, to 0 for "
                "all, or take a smaller --batch-size."
            )
        if self.microbatch != "auto" and self.microbatch and self.batch_size % self.microbatch:
            raise InputError(
                f"microbatches of {self.microbatch} do not divide a batch of {self.batch_size}: set --microbatch to a divisor, to 0 or to auto."
            )
        for name, value, known in (
            ("guess", self.guess, GUESSES),
            ("variant", self.variant, ("paper", "released")),
            ("feedback rule", self.feedback_rule, ("adam", "average", "sgd")),
            ("pixels", self.pixels, ("standardised", "symmetric")),
        ):
            if value not in known:
                raise unknown(name, value, known)

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; the model under `model`, with its name."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "model"}
        model: Any = self.model
        return {**fields, "model": {"name": models.name_of(model), **dataclasses.asdict(model)}}

    @staticmethod
    def from_json(values: dict[str, Any]) -> Experiment[Any]:
        """The inverse of `to_json`."""
        model = dict(values["model"])
        make = models.find(model.pop("name"))
        fields = {k: tuple(v) if isinstance(v, list) else v for k, v in model.items() if k != "path"}
        known = {f.name for f in dataclasses.fields(Experiment)}
        return Experiment(model=make(**fields), **{k: v for k, v in values.items() if k != "model" and k in known})
