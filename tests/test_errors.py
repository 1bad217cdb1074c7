# ruff: noqa: E501 (tables of one case a line)
"""Every message of the core is raised once and matched on its remedy; a message that nobody raises here fails the last test."""

import ast
import dataclasses
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from toynets import CELLS, FIXED, N, P, mixer, once, problem, setting

import forwardgrad as fg
from forwardgrad import errors, recipes, taps
from forwardgrad.guesses.feedback import kolen_pollack, learned_feedback
from forwardgrad.guesses.fitted_feedback import fitted_feedback
from forwardgrad.guesses.local import local_gradient
from forwardgrad.guesses.ntk import ntk
from forwardgrad.guesses.replay import feedback_alignment
from forwardgrad.guesses.weight_mirror import weight_mirror
from forwardgrad.models.localmixer import LocalMixer
from forwardgrad.models.mlp import MLP
from forwardgrad.named import Named

pytestmark = pytest.mark.float64

one = fg.activations(only="chan")
U = {"chan": jnp.ones((N, P, 4))}


def estimate(network=None, **options):
    """Trace one estimate of the one-block mixer, or of another network."""
    options = {"target": fg.local(), "guess": FIXED, "insertion": fg.activations(), "partition": CELLS, **options}
    method = fg.estimator(network or mixer(1), **options)
    return jax.eval_shape(lambda: once(method, *problem(1)).grads)


def untaught(predictor):
    """One estimate by a predictor beside which nothing is displaced."""
    method = fg.Estimator(mixer(1), fg.local(), (fg.Part(None, fg.activations(), CELLS, predictor=predictor),))
    jax.eval_shape(lambda: once(method, *problem(1)).grads)


def without_readout(network):
    return fg.Network(tuple(block._replace(readout=None) for block in network.blocks))


def edited(**changes):
    """The mixer's first block with some fields replaced."""
    return fg.Network((mixer(1).blocks[0]._replace(**changes),))


def plain(p, state, h, train):
    return h, state


def in_pieces(method, size):
    params, state = method.network.init(jax.random.key(0))
    jax.eval_shape(lambda: once(dataclasses.replace(method, microbatch=size), params, state, problem(1)[2]).grads)


def in_checked_pieces(model):
    network = model.network((3, 1, 1), 2)
    batch = {"inputs": jnp.ones((4, 3, 1, 1)), "labels": jnp.zeros(4, int)}
    dataclasses.replace(recipes.bp(network), microbatch=2).init(
        jax.random.key(0), *network.init(jax.random.key(0)), batch
    )


def mlp_by(recipe):
    network = MLP(hidden=(3,)).network((3, 1, 1), 2)
    batch = {"inputs": jnp.ones((4, 3, 1, 1)), "labels": jnp.zeros(4, int)}
    recipe(network).init(jax.random.key(0), *network.init(jax.random.key(0)), batch)


def guided_without_readout():
    """Guesses by the losses of two layers, of which the first has none."""
    network = MLP(hidden=(3, 3), local_heads=False).network((3, 1, 1), 2)
    batch = {"inputs": jnp.ones((4, 3, 1, 1)), "labels": jnp.zeros(4, int)}
    point = {"target": fg.global_loss(), "insertion": fg.activations(), "partition": ("batch",)}
    method = fg.estimator(network, guess=local_gradient(), rule=fg.rules.projection, **point)
    jax.eval_shape(lambda: once(method, *network.init(jax.random.key(0)), batch).grads)


def predicted(method):
    return jax.eval_shape(lambda: once(method, *problem(1)).grads)


def on_images(make):
    network, *rest = setting(LocalMixer(blocks=1, patches=2, channels=8, groups=2))
    make(network).init(jax.random.key(0), *rest)


def two_parts(first, second):
    parts = tuple(fg.Part(FIXED, insertion, CELLS) for insertion in (first, second))
    return jax.eval_shape(lambda: once(fg.Estimator(mixer(1), fg.local(), parts), *problem(1)).grads)


def plain_loss(value=None, **options):
    """One weight perturbation of a loss of ones, or of `value`."""
    loss = lambda w, x: (w * x) if value is None else value
    fg.value_and_grad(loss, guess=FIXED, **options)(jnp.ones(3), jnp.ones(3), key=jax.random.key(0))


def value_along(direction):
    """A direction per example on a loss that is one number."""
    loss = lambda w, x: (x @ w).mean()
    guess = fg.Guess(lambda key, state, view: dict.fromkeys(view.sites, direction))
    fg.value_and_grad(loss, guess=guess, allow_bias=True)(jnp.ones(3), jnp.ones((4, 3)), key=jax.random.key(0))


def coupled(insertion, partition=("batch",), guess=FIXED):
    """Examples that feel their mean, and estimates that keep them apart."""

    def loss(w, x):
        z = fg.tap(x @ w, "z", "batch unit")
        return ((z - z.mean(0)) ** 2).sum(-1)

    fg.value_and_grad(loss, guess=guess, insertion=insertion, partition=partition)(
        jnp.eye(3), jnp.arange(12.0).reshape(4, 3) ** 0.5, key=jax.random.key(0)
    )


def twice(x):
    return fg.tap(fg.tap(x, "z", "unit"), "z", "unit")


CASES = {
    "an axis twice": (lambda: fg.activations(shared="batch batch"), "shared names an axis twice.*give each axis its own"),
    "losses": (lambda: fg.recipes.lg_fg_a(mixer(1), losses="blocks"), "did you mean 'block'"),
    "layout": (lambda: Named(jnp.ones(3), ("unit",)).to(("batch",)), r"axes \('unit',\) cannot be laid out along \('batch',\)"),
    "tap rank": (lambda: fg.tap(jnp.ones(3), "z", "batch unit"), "name every axis once, in order"),
    "tap in scan": (
        lambda: taps.trace(lambda x: jax.lax.scan(lambda c, _: (fg.tap(c, "z", ""), None), x, length=2), 1.0),
        "move it out, unroll the loop, or give the network as blocks",
    ),
    "tap twice": (lambda: taps.trace(twice, jnp.ones(3)), "give each tap of a block its own name"),
    "no prediction": (lambda: without_readout(mixer(1)).predict(*problem(1)[:2], problem(1)[2]["inputs"]), "give it one, so that there is a prediction"),
    "no readout, global": (lambda: estimate(without_readout(mixer(1)), target=fg.global_loss()), "give the block a readout, or use a method with a global loss"),
    "no readout, local": (lambda: estimate(without_readout(mixer(1))), "use a method with a global loss, such as bp, fg-a or fg-w, or give the model local readouts"),
    "site": (lambda: estimate(insertion=fg.activations(only="chann")), "unknown site 'chann': did you mean 'chan'"),
    "sites": (lambda: estimate(insertion=fg.weights(only="q")), "unknown site 'q': known: chan, grp, tok"),
    "step": (lambda: fg.finite_difference(0.0), "must be positive, not 0.0: 1e-3 suits float32, 1e-6 float64"),
    "draws": (lambda: estimate(draws=0), "needs at least one draw, not 0"),
    "fitted outputs": (lambda: estimate(partition=("batch",), insertion=fg.activations(only="grp"), predictor=fitted_feedback()), "add it to the partition, or take another predictor than fitted feedback"),
    "antithetic": (lambda: estimate(guess=fg.antithetic(fg.rademacher()), draws=3), "in pairs: ask for an even number of draws, not 3"),
    "noise": (lambda: fg.wrappers.with_noise(recipes.bp(mixer()), -1.0), "needs a standard deviation of at least 0"),
    "draws, wrapped": (lambda: fg.wrappers.with_draws(recipes.fg_a(mixer()), 0), "needs at least one draw, not 0"),
    "finite difference, local": (lambda: estimate(mixer(), probe=fg.finite_difference(), partition=("batch",)), "use the jvp probe, or a global loss with at most the batch"),
    "finite difference, patches": (lambda: estimate(probe=fg.finite_difference()), "use the jvp probe, or a global loss with at most the batch"),
    "two parts": (lambda: two_parts(one, fg.activations()), r"two parts estimate b0/chan: give each site to one part \(only=...\)"),
    "no taps": (lambda: estimate(edited(apply=plain)), "no taps to displace: mark activations with forwardgrad.tap, or perturb the other kind"),
    "no weights": (lambda: estimate(edited(weights={}), insertion=fg.weights()), "no weights to displace: .*perturb the other kind"),
    "noise axis": (lambda: estimate(insertion=fg.weights(noise={"tok": "in height"})), "'b0#tok' names axis 'height', which neither the site nor the loss has: known are"),
    "no direction": (lambda: estimate(guess=fg.given(U)), "no direction is given for site 'b0/tok': give one under that name"),
    "direction too many": (lambda: estimate(guess=fg.given({**U, "grp": 1.0}), insertion=one), r"given for \['grp'\], which are not displaced: sites are \['b0/chan'\]"),
    "direction's shape": (lambda: estimate(guess=fg.given({"chan": jnp.ones(3)}), insertion=one), r"has shape \(3,\): give \(3, 2, 4\), the axes batch patch unit"),
    "mask on weights": (lambda: estimate(guess=fg.masked(FIXED), insertion=fg.weights()), r"'b0#(tok|chan)' is a weight: leave the mask out \(mask=False\)"),
    "bare readout": (lambda: estimate(edited(readout=mixer(1).blocks[0].readout._replace(init=lambda key: ())), guess=ntk(), rule=fg.rules.projection), "b0 has no parameters: use a network with local readouts"),
    "guided without readout": (guided_without_readout, "needs readouts, and 'layer0' has none: use a network with local readouts"),
    "one loss for all examples": (lambda: value_along(Named(jnp.ones((4, 3)), ("batch", "#:0"))), "return a vector of losses, not their mean"),
    "microbatch": (lambda: in_pieces(recipes.fg_a(mixer(1)), 2), "microbatches of 2 do not divide a batch of 3: choose a divisor"),
    "microbatch, state": (lambda: in_pieces(recipes.fg_a(edited(init=lambda key: (problem(1)[0]["b0"]["layers"], jnp.ones(1)))), 3), "use the whole batch"),
    "executor": (lambda: dataclasses.replace(recipes.bp(mixer(1)), executor="fast"), "use auto, whole or streamed"),
    "streamed": (lambda: dataclasses.replace(recipes.bp(mixer(2)), executor="streamed").check(*problem(2)), r"use the whole executor \(--executor whole\)"),
    "method": (lambda: recipes.find("lg-fga"), "unknown method 'lg-fga': did you mean 'lg-fg-a'"),
    "methods": (lambda: recipes.find("zzzz"), "unknown method 'zzzz': known: bp, bp-checkpointed"),
    "hint": (lambda: (_ for _ in ()).throw(errors.unknown("thing", "a", ["b"], "Look again.")), "known: b. Look again."),
    "insertion": (lambda: plain_loss(insertion="everything"), "use 'weights', 'activations' or an Insertion"),
    "loss's rank": (lambda: plain_loss(jnp.ones((2, 2))), "return a scalar, one loss per example, or a forwardgrad.Named that names its axes"),
    "cells and finite difference": (lambda: plain_loss(Named(jnp.ones((3, 2)), ("batch", "half")), probe=fg.finite_difference()), "use the jvp probe"),
    "coupled": (lambda: coupled(fg.activations()), "train without BatchNorm .*, or leave 'batch' out of the partition"),
    "coupled, per example": (lambda: coupled(fg.weights(per_example=True)), "share the displacement between examples, or accept the bias with allow_bias=True"),
    "mask": (lambda: fg.estimator(mixer(1), target=fg.local(), guess=fg.masked(FIXED), insertion=fg.activations()).init(jax.random.key(0), *problem(1)), r"leave the mask out \(mask=False\), or accept the bias"),
    "argument without examples": (lambda: fg.value_and_grad(lambda w, x, a: a * (x * w), guess=FIXED, insertion=fg.weights(per_example=True))(jnp.ones(3), jnp.ones(3), 2.0, key=jax.random.key(0)), "close over what is not per example"),
    "a predictor that learns": (lambda: fg.value_and_grad(lambda w, x: fg.tap(x * w, "z", "batch") ** 2, guess=FIXED, insertion="activations", predictor=learned_feedback(), allow_bias=True)(jnp.ones(3), jnp.ones(3), key=jax.random.key(0)), "use forwardgrad.estimator"),
    "misspelt leaf": (lambda: estimate(edited(weights={"chn": ("in", "out")}), insertion=fg.weights()), "did you mean 'chan'"),
    "axes of a leaf": (lambda: estimate(edited(weights={"chan": ("in",)}), insertion=fg.weights()), "name every axis once, in order"),
    "length of an axis": (lambda: estimate(edited(weights={"chan": ("in", "group")}), insertion=fg.weights()), "give it another name there"),
    "shared, not kept apart": (lambda: estimate(insertion=fg.activations(shared="batch"), partition=("patch",)), "add 'batch' to the partition, or do not share it"),
    "guided and unbiased": (lambda: estimate(guess=ntk()), "use the projection or the sign rule, or make it the predictor"),
    "nothing to learn from": (lambda: jax.eval_shape(lambda: once(fg.Estimator(mixer(1), fg.local(), (fg.Part(None, fg.activations(), CELLS, predictor=learned_feedback()),)), *problem(1)).grads), "give the part a random guess, or use direct_feedback"),
    "nothing to fit to": (lambda: untaught(fitted_feedback()), "give the part a random guess"),
    "nothing to mirror": (lambda: untaught(weight_mirror()), "give the part a random guess and activations"),
    "fitted to weights": (lambda: predicted(fg.Estimator(mixer(1), fg.local(), (fg.Part(None, fg.weights(), CELLS, predictor=fitted_feedback()),))), "give it to a part of taps"),
    "rate of a fit": (lambda: fitted_feedback(1.5), r"between 0 and 1, not 1\.5"),
    "rate of an average": (lambda: recipes.lg_fg_a_plus(mixer(1), predictor="average", predictor_rate=30), "at most 1, not 30: set --predictor-rate"),
    "no hidden taps": (lambda: mlp_by(recipes.lg_fg_a_plus), "displace all taps"),
    "unknown predictor": (lambda: recipes.lg_fg_a_plus(mixer(1), predictor="fited"), "did you mean 'fitted'"),
    "feedback rule": (lambda: recipes.dkp(mixer(1), rule="average"), "which are adam and sgd: choose one"),
    "feedback rank": (lambda: kolen_pollack(rank=0), "give a rank of at least 1, or None"),
    "feedback rank beyond the outputs": (lambda: predicted(recipes.dfa(mixer(1), feedback_rank=100)), "a rank of .* at most, not 100: give it a smaller one"),
    "Kolen-Pollack on weights": (lambda: predicted(fg.Estimator(mixer(1), fg.local(), (fg.Part(None, fg.weights(), CELLS, predictor=kolen_pollack()),))), "is a weight: use fg.activations"),
    "unknown activation": (lambda: taps.visited(lambda x: fg.tap(x, "z", ""), taps.replay({"zz": Named(jnp.ones(()), ())}))(1.0), "did you mean 'zz'"),
    "no init": (lambda: predicted(recipes.fa(edited(init=lambda key: ((), ())))), "give the block and its readout an init"),
    "feedback to weights": (lambda: predicted(fg.Estimator(mixer(1), fg.local(), (fg.Part(None, fg.weights(), CELLS, predictor=feedback_alignment()),))), "use fg.activations"),
    "outputs of a layer": (lambda: predicted(recipes.dfa(mixer(1), released=True)), "whose last readout has the axes batch and class"),
    "credit elsewhere": (lambda: predicted(recipes.lg_fg_a(mixer(1), guess=FIXED, norm_gradient=False)), r"forwardgrad.tap\(z, 'tok/linear', ..., passive=True\)"),
    "credit elsewhere unsaid": (lambda: on_images(lambda network: recipes.lg_fg_a(network, norm_gradient=False)), r"leave credit_at out \(--norm-gradient\), or accept"),
    "two credits at one tap": (lambda: on_images(lambda network: fg.estimator(network, target=fg.local(), guess=FIXED, insertion=fg.activations(credit_at=lambda name: "channel/linear"))), "one of its own"),
    "nothing changes": (lambda: fg.value_and_grad(lambda w, x: fg.tap(w * x, "z", "batch") * 0, guess=FIXED, insertion="activations")(jnp.ones(3), jnp.ones(3), key=jax.random.key(0)), "let the loss depend on what is displaced"),
    "state in microbatches": (lambda: in_checked_pieces(MLP(hidden=(3,), batch_norm=True)), r"use the whole batch \(--microbatch 0\)"),
    "no layers": (lambda: MLP(hidden=()).network((3, 1, 1), 2), "at least one unit.*for example --hidden 256 256"),
    "nonlinearity": (lambda: MLP(activation="gelu").network((3, 1, 1), 2), "use one of relu, tanh"),
}  # fmt: skip

# what is refused by an obscure error, or not at all, where a sentence with a remedy is due
SILENT = {
    "block names": (lambda: estimate(fg.Network(mixer(1).blocks * 2)), "b0.*(unique|own name|twice)"),
    "weight axes twice": (lambda: estimate(edited(weights={"chan": ("unit", "unit")}), insertion=fg.weights()), "'?(b0#)?chan'? names an axis twice"),
    "weight axes' number": (lambda: estimate(edited(weights={"chan": ("unit",)}), insertion=fg.weights()), "chan.*(rank|axes)"),
    "weight's name": (lambda: estimate(edited(weights={"chann": ("in", "unit")}), insertion=fg.weights()), "chann"),
    "draws of a part": (lambda: jax.eval_shape(lambda: once(fg.Estimator(mixer(1), fg.local(), (fg.Part(FIXED, one, CELLS, draws=0),)), *problem(1)).grads), "at least one draw"),
    "finite difference of a part": (lambda: two_parts_probe(), "use the jvp probe"),
    "length of an axis": (lambda: estimate(edited(apply=longer)), "(patch|axis).*(length|size)"),
}  # fmt: skip


def two_parts_probe():
    part = fg.Part(FIXED, fg.activations(), ("batch",), probe=fg.finite_difference())
    fg.Estimator(mixer(), fg.local(), (part,)).init(jax.random.key(0), *problem())


def longer(p, state, h, train):
    """A tap whose patches are more than the loss's: they cannot be the same patches."""
    z = fg.tap(jnp.repeat(h, 2, 1), "z", "batch patch group channel")
    return (z[:, ::2] + z[:, 1::2]), state


@pytest.mark.parametrize("name", CASES)
def test_the_message_names_the_remedy(name):
    case, remedy = CASES[name]
    with pytest.raises(fg.InputError, match=remedy):
        case()


@pytest.mark.parametrize("name", SILENT)
def test_what_cannot_work_says_so(name):
    case, remedy = SILENT[name]
    with pytest.raises(fg.InputError, match=remedy):
        case()


ROOT = Path(fg.__file__).parent
FILES = [*ROOT.glob("*.py"), *ROOT.glob("guesses/*.py"), *ROOT.glob("recipes/*.py"), ROOT / "models/mlp.py"]
ELSEWHERE = {"cite.py"}  # tested with the command line


def test_no_message_is_left_out():
    """All `raise InputError(...)` and `raise unknown(...)` of the core are among the lines that the cases above raise from."""
    written = set()
    for file in (f for f in FILES if f.name not in ELSEWHERE):
        for node in ast.walk(ast.parse(file.read_text())):
            call = node.exc if isinstance(node, ast.Raise) else None
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("InputError", "unknown"):
                written.add((str(file), node.lineno))
    raised = set()
    for case, _ in [*CASES.values(), *SILENT.values()]:
        try:
            case()
        except Exception as error:
            raised |= {(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)}
    assert sorted(f"{Path(file).name}:{line}" for file, line in written - raised) == []
