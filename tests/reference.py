"""Log-probabilities by the plain forward pass, to compare with."""

import jax
import jax.numpy as jnp
import numpy as np


class Reference:
    """Log-probabilities by the plain forward pass, each continuation on its own."""

    def __init__(self, model, params, length):
        self.length = length

        def logprobs(params, tokens):
            logits = model.logits(params, model.hidden(params, tokens))
            return jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)

        self._logprobs, self._params = jax.jit(logprobs), params

    def all(self, ids):
        """[T, V], what follows each of `ids`; padding comes after, so causality hides it."""
        padded = np.zeros((1, self.length), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self._logprobs(self._params, padded), np.float64)[0, : len(ids)]

    def __call__(self, context, continuation):
        """(log-probability, greedy) of a continuation."""
        logprobs = self.all([*context, *continuation])[len(context) - 1 : -1]
        chosen = logprobs[np.arange(len(continuation)), continuation]
        return chosen.sum(), bool((chosen == logprobs.max(-1)).all())
