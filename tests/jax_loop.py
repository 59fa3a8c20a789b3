"""A step that appends and attends, many times inside one jitted loop; for the tests of `mlacore.jax`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import mlacore.jax as mla_jax


def decode_loop(steps: int, table: Any, plan_of: Callable[[Any], Any] = lambda lengths: None) -> Callable[..., Any]:
    """``(q, pool, lengths)`` after so many steps, as a jitted function of what they were before; `pool` is donated.

    Sequences of no tokens are padding. `plan_of` makes a step's plan of its lengths.
    """

    @functools.partial(jax.jit, donate_argnums=1)
    def generate(q: Any, pool: Any, lengths: Any) -> Any:
        def step(_: Any, state: Any) -> Any:
            q, pool, lengths = state
            lengths = lengths + (lengths > 0)
            new = q[:, :, 0]  # where a model would have projections
            pool = mla_jax.append(pool, table, lengths, new[..., :512], new[..., 512:])
            out, _ = mla_jax.mla_decode(q, pool, table, lengths, plan=plan_of(lengths))
            return jnp.concatenate([out, q[..., 512:]], -1), pool, lengths

        return jax.lax.fori_loop(0, steps, step, (q, pool, lengths))

    return generate
