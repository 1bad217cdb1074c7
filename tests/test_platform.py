"""What this machine's compiler makes of our kernels in float32."""

import jax
import numpy as np

from forwardgrad.normalise import normalise


def test_a_vmapped_tangent_of_normalise_is_the_same_under_jit_in_float32():
    # jaxlib 0.10.2 compiled this to wrong numbers on the CPU; the dependency excludes it
    y = jax.random.normal(jax.random.key(0), (8, 64, 4, 16), np.float32)
    v = jax.random.normal(jax.random.key(1), (4, 8, 64, 4, 16), np.float32)
    tangents = jax.vmap(lambda v: jax.jvp(normalise, (y,), (v,))[1])
    np.testing.assert_allclose(jax.jit(tangents)(v), tangents(v), atol=1e-5)
