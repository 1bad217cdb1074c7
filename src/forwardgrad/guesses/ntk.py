"""The NTK guess: the gradient of a local loss under a random, untrained readout."""

from __future__ import annotations

from typing import Any

import jax

from forwardgrad.errors import InputError
from forwardgrad.guesses.base import Guess, View
from forwardgrad.guesses.local import gradient_of_local_losses


def ntk(*, redraw: bool = True) -> Guess:
    """u = gradient of the block's local loss with a random readout (Fournier et al. 2023, "NTK" guess).

    Args:
      redraw: a fresh readout each step, shared by the batch; False keeps the first one ("fixed NTK"). Drawn by the readouts' own `init`.

    Raises:
      InputError: (when used) a readout without parameters to draw; a site in a block without readout.
    """

    def readouts(key: jax.Array, view: View) -> dict[str, Any]:
        drawn = {
            name: readout.init(jax.random.fold_in(key, i)) for i, (name, readout) in enumerate(view.readouts.items())
        }
        bare = [name for name, params in drawn.items() if not jax.tree.leaves(params)]
        if bare:
            raise InputError(
                f"the NTK guess redraws readouts, and {', '.join(bare)} has no parameters: use a network with local readouts."
            )
        cast = lambda new, old: new.astype(old.dtype)
        return {name: jax.tree.map(cast, params, view.params[name]["readout"]) for name, params in drawn.items()}

    def propose(key: jax.Array, state: Any, view: View) -> dict[str, Any]:
        drawn = readouts(key, view) if redraw else state
        params = {name: {**own, "readout": drawn.get(name, own["readout"])} for name, own in view.params.items()}
        return gradient_of_local_losses(view, params)

    init = (lambda key, view: ()) if redraw else readouts
    return Guess(propose, init, name="ntk" if redraw else "fixed ntk", isotropic=False)
