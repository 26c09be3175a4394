"""A run folder: what a run leaves behind, and how it is found and read again.

experiment.json   the settings of the run, the commit and the versions that it ran with
model.json        the model's settings
adapter.json      of an adapter: its settings and its base; the checkpoints then hold it alone
conversations.json  of a tuning run: how many conversations it learns from, and their hash
tokenizer.model   the SentencePiece model of its data
metrics.jsonl     a line a record; tensorboard/ holds the same
bad_steps.jsonl   a line for each step that was stopped at or left out, if there is any
checkpoints/N/    params, ema where kept, progress, data, watch, check
set_aside/N/      checkpoints that were damaged or of another run
checkpoints.json  where the checkpoints are, if not here
result.json       written last: its presence says that the run is finished
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_jax.adapted import (
    MergedWeights,
    check_base,
    is_adapter,
    load_adapter,
    read_adapter,
)
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.files import read_json, write_json
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.settings import checked_fields, override, to_json
from gemma_jax.sharding import Layout
from gemma_jax.training.checkpoint import FOLDER as CHECKPOINTS
from gemma_jax.training.checkpoint import load_params
from gemma_jax.training.weights import SavedWeights
from gemma_jax.tuning.qat import Qat, rounded

RUNS = Path("runs")
EXPERIMENT, MODEL, RESULT = "experiment.json", "model.json", "result.json"
TOKENIZER, CONVERSATIONS = "tokenizer.model", "conversations.json"


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A trained model, ready for use."""

    model: Transformer
    params: Any
    tokenizer: Tokenizer


def read_result(folder: Path) -> dict[str, Any] | None:
    path = folder / RESULT
    return read_json(path, "the result of a run") if path.exists() else None


def write_result(folder: Path, result: dict[str, Any]) -> None:
    write_json(folder / RESULT, result)


def describe_model(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> None:
    write_json(folder / MODEL, to_json(config))
    tokenizer.save(folder / TOKENIZER)


def load_model(
    folder: str | Path,
    *,
    layout: Layout | None = None,
    compute_dtype: str | None = None,
    quantization: Qat | None = None,
) -> LoadedModel:
    """The model of a run folder, or of one of its checkpoints (`RUN/checkpoints/STEP`).

    Weights are the average where the run kept one. They go where `layout` says, or to the first
    device of this process. `compute_dtype` ("float32", "bfloat16") takes the place of the model's.
    With `quantization` the weights are rounded, as a file of that type would hold them.
    """
    run, _ = run_and_step(folder)
    config = read_config(run / MODEL)
    if compute_dtype is not None:
        config = override(config, {"compute_dtype": compute_dtype})
    model = Transformer(config)
    shapes = model.shapes()
    if layout is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings = jax.tree.map(lambda _: device, shapes)
    else:
        shardings = layout.shardings(model.axes(), shapes)
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        shardings,
    )
    params = load_weights(folder, config, like)
    if quantization is not None:
        params = rounded(quantization, model.axes(), params)
    return LoadedModel(model, params, Tokenizer.load(run / TOKENIZER))


def load_weights(folder: str | Path, config: ModelConfig, like: Any) -> Any:
    """The float32 parameters of a run folder or checkpoint, laid out as `like`; of an adapter's
    those of its base with the update added."""
    run, step = run_and_step(folder)
    if not is_adapter(run):
        return load_params(run, like, step)
    weights = open_weights(folder, config)

    def load(keys: tuple, wanted: Any) -> jax.Array:
        path = tuple(key.key for key in keys)
        value = weights.read(path, None, 0, wanted.shape[0])
        if value.shape != wanted.shape:
            raise UserError(f"{folder} is a run of another model; use its settings.")
        return put(value, wanted.sharding)

    return jax.tree.map_with_path(load, like)


def open_weights(folder: str | Path, config: ModelConfig) -> SavedWeights | MergedWeights:
    """The same weights, to be read a part at a time."""
    run, step = run_and_step(folder)
    if not is_adapter(run):
        return SavedWeights(run, step)
    adapter, model = read_adapter(run), Transformer(config)
    base = open_base(adapter.base)
    check_base(adapter, base, model)
    return MergedWeights(
        base, adapter.settings, load_adapter(run, step, adapter.settings, model), model
    )


def open_base(folder: str | Path) -> SavedWeights:
    """The weights that an adapter is trained on; refuses those of another adapter."""
    run, step = run_and_step(folder)
    if is_adapter(run):
        raise UserError(
            f"{run} holds an adapter, which is no base for another; merge it first (export, then "
            "import), or name its base."
        )
    return SavedWeights(run, step)


def put(value: np.ndarray, sharding: Any) -> jax.Array:
    """A host's array on the devices of a sharding."""
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def run_and_step(folder: str | Path) -> tuple[Path, int | None]:
    """The run of a folder that is a run or one of its checkpoints, and that checkpoint's step."""
    folder, step = Path(folder), None
    if folder.parent.name == CHECKPOINTS and folder.name.isdigit():
        folder, step = folder.parent.parent, int(folder.name)
    if not (folder / MODEL).exists():
        raise no_run(folder)
    return folder, step


def no_run(folder: Path) -> UserError:
    """Says of a folder that it holds no run, and which of those inside of it do."""
    found = [*folder.glob(f"*/{MODEL}"), *folder.glob(f"*/*/{MODEL}")]
    if found:
        inside = sorted(str(path.parent) for path in found)
        more = f" or {len(inside) - 4} more" if len(inside) > 4 else ""
        return UserError(
            f"{folder} is not the folder of a run, but has runs inside; give "
            f"{', '.join(inside[:4])}{more}."
        )
    return UserError(
        f"{folder} is not the folder of a run: it has no {MODEL}; give runs/NAME, or "
        f"runs/NAME/{CHECKPOINTS}/STEP."
    )


def trained_seq_len(folder: str | Path) -> int:
    """Tokens a sequence that a run (or the run of a checkpoint) was trained with.

    Of an imported model, which does not know: its context, up to 2048.
    """
    folder = run_and_step(folder)[0]
    if not (folder / EXPERIMENT).exists():
        return min(read_config(folder / MODEL).max_seq_len, 2048)
    settings = read_json(folder / EXPERIMENT, "the settings of a run")
    try:
        return int(settings["experiment"]["seq_len"])
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"{folder / EXPERIMENT} does not say seq_len; copy it again, or give seq_len."
        ) from None


def read_config(path: Path) -> ModelConfig:
    values = read_json(path, "the settings of a model")
    known = {field.name for field in dataclasses.fields(ModelConfig)}
    values.pop("type", None)
    if unknown := sorted(values.keys() - known):
        raise UserError(f"{path} has settings that this version does not know: {unknown}.")
    try:
        return ModelConfig(**checked_fields(ModelConfig, values))
    except (TypeError, UserError) as error:  # TypeError: one is missing
        raise UserError(f"{path} does not describe a model: {str(error).rstrip('.')}.") from error
