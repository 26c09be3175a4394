"""How fast a run is, and how long it waits for data."""

import time
from typing import Any

import grain
import jax
import numpy as np

from gemma_jax.sharding import Layout
from gemma_jax.training.metrics import peak_flops


class Clock:
    """Tokens a second, MFU and the share of time spent waiting for data, since the last report.

    The first step (compilation), evaluation and checkpoints are left out.
    """

    def __init__(self, layout: Layout, tokens_per_step: int, flops_per_token: int) -> None:
        self._mesh = layout.mesh
        self._tokens, self._flops = tokens_per_step, flops_per_token
        self._first = True
        self.restart()

    def restart(self) -> None:
        self._began, self._steps, self._waited = time.perf_counter(), 0, 0.0

    def wait_for(self, batches: grain.DatasetIterator) -> dict[str, np.ndarray]:
        began = time.perf_counter()
        batch = next(batches)
        self._waited += time.perf_counter() - began
        return batch

    def step_done(self, metrics: Any) -> None:
        self._steps += 1
        if self._first:
            jax.block_until_ready(metrics)
            self._first = False
            self.restart()

    def speed(self) -> dict[str, float | None]:
        """To be called when the last step's numbers have arrived from the device."""
        seconds, steps, waited = time.perf_counter() - self._began, self._steps, self._waited
        self.restart()
        if not steps:
            return {}
        rate = steps * self._tokens / seconds
        peak = peak_flops(self._mesh.devices.flat[0])
        mfu = None
        if peak is not None:
            mfu = rate * self._flops / (peak * self._mesh.size)
        return {"tokens_per_s": rate, "mfu": mfu, "data_wait": waited / seconds}
