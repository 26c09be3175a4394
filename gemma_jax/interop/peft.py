"""Adapters in the format of Hugging Face's `peft`: adapter_config.json, adapter_model.safetensors.

A is [rank, in] there and B [out, rank]. An embedding's factors are lora_embedding_A [rank, V] and
lora_embedding_B [D, rank]. `peft` updates the lookup alone where an embedding is adapted; a tied
one, which is both here, becomes adapters of embed_tokens and of lm_head with the same factors.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from gemma_jax.errors import UserError
from gemma_jax.files import read_json, write_bytes, write_json
from gemma_jax.interop.names import Weight, weight_table
from gemma_jax.model.config import ModelConfig

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX, _HEAD = "base_model.model.", "lm_head"
_EMBEDDING = "model.embed_tokens"
_LOOKUP = ("embedder", "embedding")
_TABLES = {_EMBEDDING: _LOOKUP, _HEAD: ("head", "embedding")}
# Settings that would make another function of the same tensors, and what they must be.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "bias": ("none",),
    "lora_bias": (False,),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (False,),
    "use_bdlora": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    "arrow_config": (None,),
    "megatron_config": (None,),
    # Of "pissa", "olora", "corda", "loftq" and their like the base is changed when training begins.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}

_DEFAULTS = {"rank": ("r", 8), "alpha": ("lora_alpha", 8)}

type Table = Callable[[tuple[str, ...]], np.ndarray]  # of the base, by its path
type Pairs = dict[tuple[str, ...], dict[str, np.ndarray]]  # {"a", "b"} by the path of the matrix


def write_adapter(
    folder: Path,
    config: ModelConfig,
    pairs: Mapping[tuple[str, ...], Mapping[str, np.ndarray]],
    *,
    settings: Mapping[str, Any],
    base: str,
) -> None:
    """Writes an adapter. `settings` are rank, alpha, dropout, rslora; `base` names its model."""
    tensors: dict[str, np.ndarray] = {}
    modules = set()
    for weight in weight_table(config):
        if weight.path not in pairs:
            continue
        a, b = (_layer(pairs[weight.path][name], weight) for name in ("a", "b"))
        module = weight.hf.removesuffix(".weight")
        modules.add(module.rpartition(".")[2])
        if module == _EMBEDDING:
            tensors[f"{_PREFIX}{module}.lora_embedding_A"] = a.T
            tensors[f"{_PREFIX}{module}.lora_embedding_B"] = b.T
            if not config.tied_embedding:
                continue
            module, a, b = _HEAD, b.T, a.T
            modules.add(module)
        elif module == _HEAD:
            a, b = b.T, a.T  # a table is [V, D] here and a matrix from D to V there
        rank = a.shape[-1]
        tensors[f"{_PREFIX}{module}.lora_A.weight"] = a.reshape(-1, rank).T
        tensors[f"{_PREFIX}{module}.lora_B.weight"] = b.reshape(rank, -1).T
    content = save({name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()})
    write_bytes(folder / TENSORS, content)
    write_json(
        folder / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": settings["rank"],
            "lora_alpha": settings["alpha"],
            "lora_dropout": settings["dropout"],
            "use_rslora": settings["rslora"],
            "target_modules": sorted(modules),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        },
    )


def read_adapter(folder: Path, config: ModelConfig, table: Table) -> tuple[dict[str, Any], Pairs]:
    """(rank, alpha, dropout and rslora; the factors in our layout) of a folder.

    `table` reads tables of the base, of which an adapter may hold copies. Layers that are not
    adapted get zeros; ranks and scales that differ between matrices are
    brought to the largest rank and to one scale, which changes no product.

    Raises:
      UserError: for what is no LoRA adapter, or one that another model or function needs.
    """
    values = read_json(folder / CONFIG, "the settings of a PEFT adapter")
    _check(values, folder / CONFIG)
    found = _tensors(folder / TENSORS)
    _drop_copies(found, table, config, folder)
    stacked: dict[tuple[str, ...], list[tuple[Weight, np.ndarray, np.ndarray, float]]] = {}
    for weight in weight_table(config):
        module = weight.hf.removesuffix(".weight")
        factors = _factors(found, module, weight, tied=config.tied_embedding, where=folder)
        if factors is not None:
            a, b = factors
            if (told := _of(values, "rank", module)) != a.shape[-1]:
                raise UserError(
                    f"{folder / CONFIG} gives {module} the rank {told:g}, and its factors have "
                    f"{a.shape[-1]}; fetch both files again."
                )
            scale = _scale(values, module)
            stacked.setdefault(weight.path, []).append((weight, a, b, scale))
    if found:
        raise UserError(
            f"{folder / TENSORS} has a tensor {min(found)} that the base has no matrix for; give "
            "the base that it was trained on."
        )
    if not stacked:
        raise UserError(f"{folder / TENSORS} holds no factors of an adapter; fetch it again.")
    rank = max(a.shape[-1] for parts in stacked.values() for _, a, _, _ in parts)
    rslora, alpha = _rslora(values), float(values.get("lora_alpha", 8))
    scale = alpha / (math.sqrt(rank) if rslora else rank)
    depth = {w.path: config.num_periods for w in weight_table(config) if w.layer is not None}
    pairs: Pairs = {}
    for path, parts in stacked.items():
        layers = {
            weight.layer: (
                _pad(a, -1, rank),
                _pad(b if own == scale else b * (own / scale), 0, rank),
            )
            for weight, a, b, own in parts
        }
        if path not in depth:
            ((a, b),) = layers.values()
        else:
            zero = tuple(np.zeros_like(x) for x in next(iter(layers.values())))
            columns = zip(*(layers.get(i, zero) for i in range(depth[path])), strict=True)
            a, b = (np.stack(column) for column in columns)
        pairs[path] = {"a": a.astype(np.float32), "b": b.astype(np.float32)}
    dropout = float(values.get("lora_dropout") or 0)
    return {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora}, pairs


def _layer(value: np.ndarray, weight: Weight) -> np.ndarray:
    return value if weight.layer is None else value[weight.layer]


def _check(values: Mapping[str, Any], path: Path) -> None:
    if values.get("peft_type") != "LORA":
        raise UserError(f"{path} describes a {values.get('peft_type')}; only LORA can be imported.")
    for name, plain in _PLAIN.items():
        if values.get(name, plain[0]) not in plain:
            raise UserError(
                f"{path} has {name}={values[name]!r:.60}; only {plain[0]!r} can be imported."
            )
    numbers = {name: {"": values.get(name, default)} for name, default in _DEFAULTS.values()}
    for name in ("rank_pattern", "alpha_pattern"):
        numbers[name] = values.get(name) or {}
    for name, given in numbers.items():
        try:
            sound = all(
                type(x) in (int, float) and 0 < x < math.inf and re.compile(pattern)
                for pattern, x in given.items()
            )
        except (AttributeError, re.error):
            sound = False
        if not sound:
            raise UserError(
                f"{path} has {name}={values[name]!r:.60}, which must be above 0, or patterns of "
                "names with such numbers; fetch it again."
            )


def _tensors(path: Path) -> dict[str, np.ndarray]:
    try:
        with safe_open(path, "np") as file:
            return {
                name.removeprefix(_PREFIX): np.asarray(file.get_tensor(name), np.float32)
                for name in list(file.keys())
            }
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is no whole safetensors file ({error}); fetch it again.") from None


def _drop_copies(
    found: dict[str, np.ndarray], table: Table, config: ModelConfig, where: Path
) -> None:
    """Takes the base's own tables out of `found`, which peft keeps beside their adapters."""
    for module, path in _TABLES.items():
        for name in ("base_layer.weight", "weight"):
            copy = found.pop(f"{module}.{name}", None)
            if copy is None:
                continue
            own = table(path if module == _EMBEDDING or not config.tied_embedding else _LOOKUP)
            # A base in another precision is still the same.
            if own.shape != copy.shape or np.linalg.norm(own - copy) > 0.2 * np.linalg.norm(own):
                raise UserError(
                    f"{where} was trained on another table of {module} than the base has; give "
                    "the base that it was trained on."
                )


def _factors(
    found: dict[str, np.ndarray], module: str, weight: Weight, *, tied: bool, where: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """A [in..., R] and B [R, out...] of one matrix; takes them out of `found`."""
    if module == _EMBEDDING:
        both = _both(found, f"{module}.lora_embedding_{{}}", where)
        head = _both(found, f"{_HEAD}.lora_{{}}.weight", where) if tied else both
        turned = both and (both[1].T, both[0].T)
        if tied and not (turned and head and all(map(np.array_equal, turned, head))):
            if turned is head is None:
                return None
            raise UserError(
                f"{where} adapts embed_tokens and lm_head apart, and the base has one table for "
                "both; adapt neither, or both with the same factors."
            )
    else:
        both = _both(found, f"{module}.lora_{{}}.weight", where)
    if both is None:
        return None
    a, b = both
    pair = (b, a) if module == _HEAD else (a.T, b.T)
    cut = 1 if weight.kind == "embedding" else weight.inputs
    shapes = (math.prod(weight.shape[:cut]), math.prod(weight.shape[cut:]))
    if (pair[0].shape[0], pair[1].shape[1]) != shapes or pair[0].shape[1] != pair[1].shape[0]:
        raise UserError(
            f"the factors of {module} in {where} have shapes {a.shape} and {b.shape}, which do not "
            "fit the base; give the base that it was trained on."
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError(f"the factors of {module} in {where} are not finite; fetch it again.")
    rank = pair[0].shape[1]
    return pair[0].reshape(*weight.shape[:cut], rank), pair[1].reshape(rank, *weight.shape[cut:])


def _scale(values: Mapping[str, Any], module: str) -> float:
    rank = _of(values, "rank", module)
    return float(_of(values, "alpha", module) / (math.sqrt(rank) if _rslora(values) else rank))


def _rslora(values: Mapping[str, Any]) -> bool:
    return bool(values.get("use_rslora"))


def _of(values: Mapping[str, Any], name: str, module: str) -> float:
    """The rank or alpha of a module: that of the first pattern that it ends with, or of all."""
    for pattern, own in (values.get(f"{name}_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(own)
    return float(values.get(*_DEFAULTS[name]))


def _both(
    found: dict[str, np.ndarray], name: str, where: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """A and B of one matrix, taken out of `found`; None where it has neither."""
    a, b = (found.pop(name.format(factor), None) for factor in "AB")
    if a is None and b is None:
        return None
    if a is None or b is None or not a.ndim == b.ndim == 2:
        raise UserError(
            f"{where} has no matrices {name.format('A')} and {name.format('B')}; fetch it again."
        )
    return a, b


def _pad(x: np.ndarray, axis: int, rank: int) -> np.ndarray:
    width = [(0, 0)] * x.ndim
    width[axis] = (0, rank - x.shape[axis])
    return np.pad(x, width)
