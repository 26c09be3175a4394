"""LoRA: a trained low-rank update beside each frozen matrix (arXiv 2106.09685).

y = x W + scale * dropout(x) A B, with A [in..., R] and B [R, out...]. `join` puts such sums in the
place of the matrices of a parameter tree, so nothing of W's size is made, in training or when
several adapters serve one batch. B starts at zero, so the model starts as its base.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gemma_jax.errors import UserError, require_fractions, require_positive
from gemma_jax.model.matrix import is_matrix
from gemma_jax.settings import check_types
from gemma_jax.tuning.low_rank import Bank, LowRank, update

ATTENTION = ("query", "key", "value", "output")
MLP = ("gate", "up", "down")
TABLES = {"embedder": "embedding", "head": "head"}

type Path = tuple[str, ...]
type Axes = tuple[str | None, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """An adapter on a base in its full precision.

    `targets` are matrices by the names of the parameter tree (query, key, value, output, gate, up,
    down), and `embedding`, the table that tokens are looked up in; where it is tied, logits are
    made with the updated table too. `head` is the output table of an untied model. The update is
    scaled by alpha / rank, with `rslora` by alpha / sqrt(rank) (arXiv 2312.03732). `dropout` is the
    share of A's inputs that are left out in training; a table has none.
    """

    targets: tuple[str, ...] = (*ATTENTION, *MLP)
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    rslora: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.targets, str):
            raise UserError(f'targets is one text; write ("{self.targets}",), with the comma.')
        check_types(self)
        require_positive(self, "rank", "alpha")
        require_fractions(self, "dropout", below_one=True)
        known = (*ATTENTION, *MLP, *TABLES.values())
        for name in self.targets:
            if name not in known:
                raise UserError(
                    f"there is no matrix '{name}' to adapt; targets may be {', '.join(known)}."
                )
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise UserError(f"targets={self.targets} must name each matrix once, and one at least.")

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QLora(Lora):
    """An adapter on a base that is frozen in NF4 (`tuning.nf4`), all but its norms.

    With `embedding=False` the tables stay in the compute dtype.
    """

    embedding: bool = True


def is_stacked(path: Path) -> bool:
    return path[0] == "periods"


def target_of(path: Path) -> str:
    """What `Lora.targets` calls a parameter."""
    return TABLES.get(path[0], path[-1])


def inputs_of(path: Path, axes: Axes) -> int:
    """How many dimensions of a matrix are summed over; 0 for a table, which is [V, D].

    Every matrix maps from or to the embedding axis.
    """
    if path[0] in TABLES:
        return 0
    own = [name for name in axes if name != "layers"]
    return 1 if own[0] == "embed" else own.index("embed")


def is_norm(path: Path) -> bool:
    return path[-1] == "scale"


def leaves_of_axes(axes: Any) -> list[tuple[Path, Axes]]:
    """(path, logical axes) of each parameter."""
    return _leaves(axes, is_leaf=lambda x: isinstance(x, tuple))


def pairs_of(adapter: Any) -> dict[Path, Any]:
    """{"a", "b"} of each matrix that an adapter adapts, by its path."""
    return dict(_leaves(adapter, is_leaf=_is_pair))


def adapter_axes(settings: Lora, axes: Any) -> Any:
    """The logical axes of an adapter: {"a", "b"} in the place of each matrix that it adapts."""
    tree: dict[str, Any] = {}
    found = set()
    for path, own in leaves_of_axes(axes):
        if target_of(path) not in settings.targets or is_norm(path):
            continue
        found.add(target_of(path))
        layers = own[:1] if is_stacked(path) else ()
        rest = own[len(layers) :]
        cut = inputs_of(path, own) or 1
        pair = {"a": (*layers, *rest[:cut], None), "b": (*layers, None, *rest[cut:])}
        _put(tree, path, pair)
    for name in settings.targets:
        if name not in found:
            raise UserError(
                f"the model has no matrix '{name}' to adapt: its embedding is tied; leave it out "
                "of targets."
            )
    return tree


def init_adapter(settings: Lora, axes: Any, shapes: Any, rng: Array) -> Any:
    """A fresh float32 adapter, whose update is zero.

    A is uniform in +-1 / sqrt(inputs) and B zero, as in PEFT; of a table it is A that is zero.
    """
    own_shapes = dict(_leaves(shapes))
    tree: dict[str, Any] = {}
    drawn: dict[tuple, list[tuple[Path, Array]]] = {}  # A's by their shape and bound
    pairs = pairs_of(adapter_axes(settings, axes))
    for number, (path, pair) in enumerate(pairs.items()):
        shape = own_shapes[path].shape
        layers = shape[:1] if is_stacked(path) else ()
        rest, cut = shape[len(layers) :], len(pair["a"]) - len(layers) - 1
        if settings.rank > (most := min(math.prod(rest[:cut]), math.prod(rest[cut:]))):
            raise UserError(
                f"Lora.rank={settings.rank} is above {most}, the rank that "
                f"'{target_of(path)}' itself can have; lower it."
            )
        a = (*layers, *rest[:cut], settings.rank)
        b = (*layers, settings.rank, *rest[cut:])
        key = jax.random.fold_in(rng, number)
        if path[0] in TABLES:
            _put(tree, path, {"a": jnp.zeros(a), "b": jax.random.normal(key, b)})
        else:
            _put(tree, path, {"a": None, "b": jnp.zeros(b)})
            drawn.setdefault((a, math.prod(rest[:cut]) ** -0.5), []).append((path, key))
    for (a, bound), group in drawn.items():
        # Together: the generator is compiled once a shape. Once a matrix took minutes.
        paths, keys = zip(*group, strict=True)
        draw = functools.partial(jax.random.uniform, shape=a, minval=-bound, maxval=bound)
        for path, value in zip(paths, jax.vmap(draw)(jnp.stack(keys)), strict=True):
            _put(tree, (*path, "a"), value)
    return tree


def join(settings: Lora, adapter: Any, base: Any, rng: Array | None) -> Any:
    """The base's parameters, with a `LowRank` in the place of each matrix that is adapted.

    With a key, a share `dropout` of A's inputs is left out.
    """
    pairs = pairs_of(adapter)
    numbers = {path: number for number, path in enumerate(pairs)}
    drop = settings.dropout if rng is not None else 0.0

    def place(keys: tuple, weight: Any) -> Any:
        path = _names(keys)
        if path not in pairs:
            return weight
        a, b, key = pairs[path]["a"], pairs[path]["b"], None
        if drop and rng is not None and path[0] not in TABLES:
            key = jax.random.fold_in(rng, numbers[path])
            key = jax.random.split(key, a.shape[0]) if is_stacked(path) else key
        return LowRank(weight, a, b, key, settings.scale, drop)

    return jax.tree.map_with_path(place, base, is_leaf=is_matrix)


def join_many(adapters: Sequence[tuple[Lora, Any]], base: Any) -> Any:
    """Parameters for batches whose rows ask for adapters by number; 0 is the base alone.

    Adapters may differ in rank and targets: what one lacks is zero.
    """
    sets = [(own.scale, pairs_of(tree)) for own, tree in adapters]
    rank = max(own.rank for own, _ in adapters)

    def place(keys: tuple, weight: Any) -> Any:
        path = _names(keys)
        if not any(path in pairs for _, pairs in sets):
            return weight
        like = next(pairs[path] for _, pairs in sets if path in pairs)
        front = 1 if is_stacked(path) else 0
        zero = {name: jnp.zeros_like(x) for name, x in like.items()}
        parts = [(0.0, zero), *((scale, pairs.get(path, zero)) for scale, pairs in sets)]
        a = jnp.stack([_widened(p["a"], -1, rank) for _, p in parts], axis=front)
        b = jnp.stack([_widened(p["b"] * s, front, rank) for s, p in parts], axis=front)
        return Bank(weight, a, b, None)

    return jax.tree.map_with_path(place, base, is_leaf=is_matrix)


def merge(settings: Lora, adapter: Any, base: Any) -> Any:
    """The base's parameters (arrays) with the updates added."""
    pairs = pairs_of(adapter)

    def add(keys: tuple, weight: Array) -> Array:
        path = _names(keys)
        if path not in pairs:
            return weight
        added = update(**pairs[path], scale=settings.scale, stacked=is_stacked(path))
        return weight + added.astype(weight.dtype)

    return jax.tree.map_with_path(add, base)


def _widened(x: Array, axis: int, rank: int) -> Array:
    pad = [(0, 0)] * x.ndim
    pad[axis] = (0, rank - x.shape[axis])
    return jnp.pad(x, pad)


def _is_pair(x: Any) -> bool:
    return isinstance(x, Mapping) and x.keys() == {"a", "b"}


def _names(keys: tuple) -> Path:
    return tuple(key.key for key in keys)


def _leaves(tree: Any, is_leaf: Any = None) -> list[tuple[Path, Any]]:
    return [(_names(keys), x) for keys, x in jax.tree.leaves_with_path(tree, is_leaf=is_leaf)]


def _put(tree: dict[str, Any], path: Path, value: Any) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value
