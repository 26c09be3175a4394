"""Run folders that hold an adapter alone: which base it belongs to, and the two as one model.

`adapter.json` names the adapter's settings and its base, by path and by the hash of its weights.
The model of such a folder is what was trained: the base (of a QLoRA, what NF4 keeps of it) and the
update added to it.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.files import read_json, write_json
from gemma_jax.model.transformer import Transformer
from gemma_jax.settings import checked_fields, to_json
from gemma_jax.training.checkpoint import load_params
from gemma_jax.training.weights import weights_hash
from gemma_jax.tuning import lora
from gemma_jax.tuning.lora import Lora, QLora
from gemma_jax.tuning.nf4 import Nf4, pack

FILE = "adapter.json"
_KINDS = {"Lora": Lora, "QLora": QLora}

type Names = tuple[str, ...]


class Weights(Protocol):
    """The weights of a run folder, read in parts (`training.weights.SavedWeights`)."""

    def read(self, path: Names, layer: int | None, start: int, stop: int) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What `adapter.json` says."""

    settings: Lora
    base: str
    base_hash: str


def is_adapter(run: Path) -> bool:
    return (run / FILE).exists()


def write_adapter(run: Path, adapter: Adapter, *, seen_from: Path | None = None) -> None:
    """Notes the base of a run, or refuses another one than it was begun with.

    `seen_from` is where the folder will be, if it is written elsewhere.
    """
    if is_adapter(run):
        if (known := read_adapter(run).base_hash) != adapter.base_hash:
            raise UserError(
                f"{run} was begun on a base of the hash {known[:12]}, and {adapter.base} now has "
                f"{adapter.base_hash[:12]}; give back that base, or the experiment another name."
            )
        return
    value = {
        "adapter": to_json(adapter.settings),
        "base": adapter.base,
        "base_from_here": os.path.relpath(adapter.base, seen_from or run),
        "base_hash": adapter.base_hash,
    }
    write_json(run / FILE, value)


def read_adapter(run: Path) -> Adapter:
    """The adapter's settings and its base, which is looked for where it was, seen from the current
    folder or from the run's."""
    path = run / FILE
    value = read_json(path, "the description of an adapter")
    try:
        settings = dict(value["adapter"])
        kind = _KINDS[settings.pop("type")]
        adapter = Adapter(
            kind(**checked_fields(kind, settings)), str(value["base"]), str(value["base_hash"])
        )
        places = [Path(adapter.base), run / str(value["base_from_here"])]
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe an adapter: {error!r}; copy it again.") from None
    for place in places:
        if place.exists():
            return dataclasses.replace(adapter, base=os.path.normpath(place))
    raise UserError(
        f"the base {adapter.base} of the adapter {run} is not there; put it back, or write where "
        f"it is into {path} as base."
    )


def check_base(adapter: Adapter, weights: Weights, model: Transformer) -> None:
    """Refuses a base whose weights are not those that the adapter was trained on."""
    if weights_hash(model.shapes(), weights.read) != adapter.base_hash:
        raise UserError(
            f"{adapter.base} is not the base that the adapter was trained on: its weights have "
            f"another hash than {adapter.base_hash[:12]}; give back that base."
        )


def load_adapter(run: Path, step: int | None, settings: Lora, model: Transformer) -> Any:
    """The float32 adapter of a run, on the first device."""
    axes, shapes = model.axes(), model.shapes()
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.eval_shape(
        lambda: lora.init_adapter(settings, axes, shapes, jax.random.key(0)),
    )
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        like,
    )
    return load_params(run, like, step)


def load_frozen(
    weights: Weights,
    settings: Lora,
    model: Transformer,
    place: Callable[[np.ndarray, tuple | None], jax.Array],
) -> Any:
    """The base of an adapter, a parameter at a time: norms in float32, all else in the model's
    compute dtype, or of a QLoRA in NF4. `place(value, axes)` puts an array on the devices; axes is
    None for the parts of a matrix in NF4."""
    shapes, axes = model.shapes(), dict(lora.leaves_of_axes(model.axes()))

    def load(keys: tuple, like: Any) -> Any:
        path = _names(keys)
        value = _whole(weights, path, like)
        if _in_nf4(settings, path):
            inputs = lora.inputs_of(path, axes[path])
            packed = pack(value, inputs, stacked=lora.is_stacked(path))
            return jax.tree.map(lambda x: place(np.asarray(x), None), packed)
        if not lora.is_norm(path):
            value = value.astype(model.config.compute_dtype)
        return place(value, axes[path])

    return jax.tree.map_with_path(load, shapes)


def held_alike(settings: Lora) -> tuple[bool, ...]:
    """How the base of an adapter is held: adapters that agree in it can share one."""
    if isinstance(settings, QLora):
        return True, settings.embedding
    return (False,)


class MergedWeights:
    """A base with its adapter added, read like the weights of a run."""

    def __init__(self, weights: Weights, settings: Lora, tree: Any, model: Transformer) -> None:
        self._weights, self._settings = weights, settings
        self._pairs = {p: jax.device_get(pair) for p, pair in lora.pairs_of(tree).items()}
        self._axes = dict(lora.leaves_of_axes(model.axes()))
        self._shapes = {_names(p): x for p, x in jax.tree.leaves_with_path(model.shapes())}
        self._tables: dict[Names, Nf4] = {}

    def read(self, path: Names, layer: int | None, start: int, stop: int) -> np.ndarray:
        """float32 rows [start, stop) of a parameter, or all of one layer of a stacked one."""
        value = self._base(path, layer, start, stop)
        if path not in self._pairs:
            return value
        a, b = self._pairs[path]["a"], self._pairs[path]["b"]
        stacked = lora.is_stacked(path)
        if layer is not None:
            a, b, stacked = a[layer], b[layer], False
        elif stacked:
            a, b = a[start:stop], b[start:stop]
        else:
            a = a[start:stop]
        return value + lora.update(a, b, scale=self._settings.scale, stacked=stacked)

    def _base(self, path: Names, layer: int | None, start: int, stop: int) -> np.ndarray:
        if not _in_nf4(self._settings, path):
            return self._weights.read(path, layer, start, stop)
        inputs = lora.inputs_of(path, self._axes[path])
        if lora.is_stacked(path):
            value = self._weights.read(path, layer, start, stop)
            return np.asarray(pack(value, inputs, stacked=layer is None).whole(layer is None))
        if path not in self._tables:  # whole: its scales are quantised with one offset
            value = _whole(self._weights, path, self._shapes[path])
            self._tables[path] = pack(value, inputs, stacked=False)
        return np.asarray(self._tables[path].array()[start:stop])


def _in_nf4(settings: Lora, path: Names) -> bool:
    if not isinstance(settings, QLora) or lora.is_norm(path):
        return False
    return settings.embedding or path[0] not in lora.TABLES


def _whole(weights: Weights, path: Names, like: Any) -> np.ndarray:
    return weights.read(path, None, 0, like.shape[0])


def _names(keys: tuple) -> Names:
    return tuple(key.key for key in keys)
