"""forwardgrad: training neural networks without backpropagating through them. Importing it needs JAX alone."""

from forwardgrad import recipes as recipes
from forwardgrad import rules as rules
from forwardgrad import wrappers as wrappers
from forwardgrad.engine import Estimate as Estimate
from forwardgrad.engine import Estimator as Estimator
from forwardgrad.engine import Part as Part
from forwardgrad.engine import estimator as estimator
from forwardgrad.errors import InputError as InputError
from forwardgrad.functional import value_and_grad as value_and_grad
from forwardgrad.guesses.base import Guess as Guess
from forwardgrad.guesses.base import Site as Site
from forwardgrad.guesses.base import View as View
from forwardgrad.guesses.given import given as given
from forwardgrad.guesses.given import masked as masked
from forwardgrad.guesses.random import antithetic as antithetic
from forwardgrad.guesses.random import gaussian as gaussian
from forwardgrad.guesses.random import orthogonal as orthogonal
from forwardgrad.guesses.random import rademacher as rademacher
from forwardgrad.insertions import activations as activations
from forwardgrad.insertions import hidden as hidden
from forwardgrad.insertions import weights as weights
from forwardgrad.named import Named as Named
from forwardgrad.network import Block as Block
from forwardgrad.network import Network as Network
from forwardgrad.network import Readout as Readout
from forwardgrad.probes import finite_difference as finite_difference
from forwardgrad.probes import jvp as jvp
from forwardgrad.rules import Rule as Rule
from forwardgrad.taps import tap as tap
from forwardgrad.targets import global_loss as global_loss
from forwardgrad.targets import last_local as last_local
from forwardgrad.targets import local as local


def load_run(directory):
    """Parameters and a predict function of a run directory: see `forwardgrad.training.runs.load_run`, which needs the lab's packages."""
    from forwardgrad.training.runs import load_run as load

    return load(directory)
