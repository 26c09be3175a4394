"""What an importer needs of a foreign file: tensors by name, read in pieces."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import numpy as np

from gemma_jax.errors import UserError
from gemma_jax.interop.names import Weight


class Tensors(Protocol):
    """The tensors of a file (or of several) by name; shapes as in PyTorch, rows first."""

    where: str  # for messages

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of a tensor in float32."""
        ...


def check_names(tensors: Tensors, wanted: Mapping[str, Weight]) -> None:
    """Refuses a file that lacks a tensor, has one too many or one of another shape."""
    for name, weight in wanted.items():
        if name not in tensors.shapes:
            raise UserError(
                f"{tensors.where} has no tensor {name}, which its settings promise; fetch it again."
            )
        if tensors.shapes[name] != weight.foreign_shape:
            raise UserError(
                f"tensor {name} of {tensors.where} has shape {tensors.shapes[name]}, and its "
                f"settings make it {weight.foreign_shape}; fetch it again."
            )
    if surplus := sorted(tensors.shapes.keys() - wanted.keys()):
        raise UserError(
            f"{tensors.where} has a tensor {surplus[0]} that Gemma 3 as its settings describe it "
            f"does not ({len(surplus)} of that kind); it is another architecture."
        )


def pieces(tensors: Tensors, name: str, weight: Weight) -> Iterator[tuple[int, int, np.ndarray]]:
    """(first row, end, values), all in our layout: an embedding in pieces, all else whole."""
    for start, stop in weight.cuts(weight.foreign_shape[0]):
        value = tensors.read(name, start, stop)
        if not np.isfinite(value).all():
            raise UserError(
                f"tensor {name} of {tensors.where} holds NaN or infinity; fetch it again."
            )
        value = weight.from_foreign(value)
        yield start, start + len(value), value


def by_name(weights: Iterable[Weight], attribute: str) -> dict[str, Weight]:
    return {getattr(weight, attribute): weight for weight in weights}
