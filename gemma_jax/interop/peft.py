"""Adapters in the format of Hugging Face's `peft`: adapter_config.json, adapter_model.safetensors.

A is [rank, in] there and B [out, rank]. An embedding's factors are lora_embedding_A [rank, V] and
lora_embedding_B [D, rank]. `peft` updates the lookup alone where an embedding is adapted; a tied
one, which is both here, becomes adapters of embed_tokens and of lm_head with the same factors.
"""

import math
import re
from collections.abc import Mapping
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
}

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


def read_adapter(folder: Path, config: ModelConfig) -> tuple[dict[str, Any], Pairs]:
    """(rank, alpha, dropout and rslora; the factors in our layout) of a folder.

    Layers that are not adapted get zeros; ranks and scales that differ between matrices are
    brought to the largest rank and to one scale, which changes no product.

    Raises:
      UserError: for what is no LoRA adapter, or one that another model or function needs.
    """
    values = read_json(folder / CONFIG, "the settings of a PEFT adapter")
    _check(values, folder / CONFIG)
    found = _tensors(folder / TENSORS)
    stacked: dict[tuple[str, ...], list[tuple[Weight, np.ndarray, np.ndarray, float]]] = {}
    for weight in weight_table(config):
        module = weight.hf.removesuffix(".weight")
        factors = _factors(found, module, weight, tied=config.tied_embedding, where=folder)
        if factors is not None:
            a, b = factors
            scale = _scale(values, module, a.shape[-1])
            stacked.setdefault(weight.path, []).append((weight, a, b, scale))
    if found:
        raise UserError(
            f"{folder / TENSORS} has a tensor {min(found)} that the base has no matrix for; give "
            "the base that it was trained on."
        )
    if not stacked:
        raise UserError(f"{folder / TENSORS} holds no factors of an adapter; fetch it again.")
    rank = max(a.shape[-1] for parts in stacked.values() for _, a, _, _ in parts)
    rslora = bool(values.get("use_rslora"))
    alpha = float(values.get("lora_alpha", 8))
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
                f"{path} has {name}={values[name]!r}; only {plain[0]!r} can be imported."
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


def _factors(
    found: dict[str, np.ndarray], module: str, weight: Weight, *, tied: bool, where: Path
) -> tuple[np.ndarray, np.ndarray] | None:
    """A [in..., R] and B [R, out...] of one matrix; takes them out of `found`."""
    if module == _EMBEDDING:
        a, b = (found.pop(f"{module}.lora_embedding_{name}", None) for name in "AB")
        if a is None or b is None:
            return None
        pair = a.T, b.T
        if tied:
            head = [found.pop(f"{_HEAD}.lora_{name}.weight", None) for name in "AB"]
            if not all(
                mine is not None and np.array_equal(mine, x)
                for mine, x in zip(head, (b.T, a.T), strict=True)
            ):
                raise UserError(
                    f"{where} adapts embed_tokens and lm_head apart, and the base has one table "
                    "for both; adapt neither, or both with the same factors."
                )
    else:
        a, b = (found.pop(f"{module}.lora_{name}.weight", None) for name in "AB")
        if a is None or b is None:
            return None
        pair = (b, a) if module == _HEAD else (a.T, b.T)
    cut = 1 if weight.kind == "embedding" else weight.inputs
    shapes = (math.prod(weight.shape[:cut]), math.prod(weight.shape[cut:]))
    if (pair[0].shape[0], pair[1].shape[1]) != shapes or pair[0].shape[1] != pair[1].shape[0]:
        raise UserError(
            f"the factors of {module} in {where} have shapes {a.shape} and {b.shape}, which do not "
            "fit the base; give the base that it was trained on."
        )
    rank = pair[0].shape[1]
    return pair[0].reshape(*weight.shape[:cut], rank), pair[1].reshape(rank, *weight.shape[cut:])


def _scale(values: Mapping[str, Any], module: str, rank: int) -> float:
    alpha = values.get("lora_alpha", 8)
    for pattern, own in (values.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = own
    return float(alpha) / (math.sqrt(rank) if values.get("use_rslora") else rank)


def _pad(x: np.ndarray, axis: int, rank: int) -> np.ndarray:
    width = [(0, 0)] * x.ndim
    width[axis] = (0, rank - x.shape[axis])
    return np.pad(x, width)
