"""Models from and for other programs: Hugging Face folders and GGUF files, a tensor at a time."""

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gemma_jax import adapted, runs
from gemma_jax.adapted import Weights
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.files import PARTIAL_SUFFIX, disk_errors, read_json, write_json, write_text
from gemma_jax.interop import gguf, hf, hf_tensors, peft, tokenizers
from gemma_jax.interop.gguf_file import GgufFile
from gemma_jax.interop.names import Weight, weight_table
from gemma_jax.interop.tensors import Tensors, by_name, check_names, pieces
from gemma_jax.model.config import ModelConfig, count_parameters
from gemma_jax.model.transformer import Transformer
from gemma_jax.progress import progress
from gemma_jax.training.weights import WeightsWriter, weights_hash
from gemma_jax.tuning import lora

IMPORTED, MODELFILE = "imported.json", "Modelfile"
_ADAPTER_SETTINGS = ("rank", "alpha", "dropout", "rslora")


def import_model(
    source: str | Path, dest: str | Path, *, base: str | Path | None = None
) -> dict[str, Any]:
    """Turns a Hugging Face folder or a GGUF file into a folder that every verb takes as a run.

    The settings come from the file, never from its name; weights are kept in float32. Memory holds
    one tensor (of an embedding, a piece). A folder of `peft` holds an adapter, whose `base` is the
    folder of a run. Returns what was imported.
    """
    source, dest = Path(source), Path(dest)
    _must_be_new(dest)
    if (source / peft.CONFIG).exists():
        return _import_adapter(source, dest, base)
    if base is not None:
        raise UserError(f"{source} is no adapter, so it has no base; leave base={base} out.")
    if source.is_dir():
        config, multimodal = hf.read_config(source)
        tensors: Tensors = hf_tensors.HfTensors(
            source, multimodal=multimodal, tied=config.tied_embedding
        )
        tokenizer, column = tokenizers.from_hf(source), "hf"
    else:
        file = GgufFile(source)
        config = gguf.read_config(file)
        tensors = gguf.GgufTensors(file, weight_table(config))
        tokenizer, column = tokenizers.from_gguf(file.fields, str(source)), "gguf"
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"the tokenizer of {source} has {tokenizer.vocab_size} ids and its model "
            f"{config.vocab_size}; they do not belong together."
        )
    wanted = by_name(weight_table(config), column)
    check_names(tensors, wanted)
    value = {"source": str(source), "format": column, "parameters": _size(wanted.values())}
    with _aside(dest) as folder:
        _write_weights(folder, config, tensors, wanted)
        runs.describe_model(folder, config, tokenizer)
        write_json(folder / IMPORTED, value)
    return {"path": str(dest), **value}


def export_model(
    checkpoint: str | Path, dest: str | Path, *, format: str, dtype: str = "bf16"
) -> dict[str, Any]:
    """Writes the model of a run folder (or of `RUN/checkpoints/STEP`) for other programs.

    Args:
      format: "hf", a folder that transformers and mlx-lm load; or "gguf", a file that llama.cpp,
        Ollama and LM Studio run, with a Modelfile beside it. `dest` is then the file if it ends
        in .gguf, else a folder. Of a run that holds an adapter both get the merged model; "peft"
        gets the adapter alone, in float32.
      dtype: "f32", "bf16" or "f16"; for gguf also "q8_0" and "q4_0". Norms of a GGUF stay float32.
    """
    if format == "peft":
        return _export_adapter(checkpoint, Path(dest))
    kinds = {"hf": hf_tensors.DTYPES, "gguf": gguf.DTYPES}
    if format not in kinds:
        raise UserError(f"format={format!r} must be one of {', '.join(kinds)}, peft.")
    if dtype not in kinds[format]:
        raise UserError(f"dtype={dtype!r} of {format} must be one of {', '.join(kinds[format])}.")
    run, _ = runs.run_and_step(checkpoint)
    config = runs.read_config(run / runs.MODEL)
    tokenizer = Tokenizer.load(run / runs.TOKENIZER)
    saved, weights = runs.open_weights(checkpoint, config), weight_table(config)
    dest = Path(dest)
    _must_be_new(dest)
    with progress("export", len(weights)) as advance:
        read = _reader(saved, advance)
        if format == "hf":
            settings = hf.to_config(config, dtype)
            with _aside(dest) as folder:
                hf_tensors.write_tensors(folder, weights, read, dtype)
                tokenizers.to_hf(tokenizer, folder, context=config.max_seq_len)
                write_json(folder / hf.CONFIG, settings)
                write_json(folder / hf.GENERATION, hf.generation_config(tokenizer.vocab_size))
                write_text(folder / "README.md", _card(run, config, dtype))
        else:
            vocabulary = tokenizers.to_gguf(tokenizer, config.vocab_size)
            fields = gguf.to_fields(config, vocabulary, dtype, run.name)
            with _gguf_file(dest, f"{run.name}-{dtype}.gguf") as file:
                gguf.write_model(file, fields, weights, read, dtype)
    return {"path": str(dest), "format": format, "dtype": dtype, "parameters": _size(weights)}


def _export_adapter(checkpoint: str | Path, dest: Path) -> dict[str, Any]:
    run, step = runs.run_and_step(checkpoint)
    if not adapted.is_adapter(run):
        raise UserError(f"{run} holds a whole model and no adapter; export it as hf or gguf.")
    _must_be_new(dest)
    adapter, config = adapted.read_adapter(run), runs.read_config(run / runs.MODEL)
    tree = adapted.load_adapter(run, step, adapter.settings, Transformer(config))
    pairs = {
        path: {name: np.asarray(x) for name, x in pair.items()}
        for path, pair in lora.pairs_of(tree).items()
    }
    settings = {name: getattr(adapter.settings, name) for name in _ADAPTER_SETTINGS}
    with _aside(dest) as folder:
        peft.write_adapter(folder, config, pairs, settings=settings, base=adapter.base)
    size = sum(x.size for pair in pairs.values() for x in pair.values())
    return {"path": str(dest), "format": "peft", "dtype": "f32", "parameters": size}


def _import_adapter(source: Path, dest: Path, base: str | Path | None) -> dict[str, Any]:
    if base is None:
        raise UserError(f"{source} holds an adapter; give the run of its base (--base).")
    run, _ = runs.run_and_step(base)
    config = runs.read_config(run / runs.MODEL)
    model = Transformer(config)
    weights = runs.open_base(base)
    settings, pairs = peft.read_adapter(
        source, config, lambda path: weights.read(path, None, 0, config.vocab_size)
    )
    targets = tuple(dict.fromkeys(lora.target_of(path) for path in pairs))
    own = lora.Lora(targets=targets, **settings)
    shapes = jax.eval_shape(
        lambda: lora.init_adapter(own, model.axes(), model.shapes(), jax.random.key(0))
    )
    known = weights_hash(model.shapes(), weights.read)
    described = adapted.Adapter(own, str(base), known)
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
    value = {"source": str(source), "format": "peft", "parameters": size}
    with _aside(dest) as folder:
        writer = WeightsWriter(folder, shapes)
        for path, pair in lora.pairs_of(shapes).items():
            for name, like in pair.items():
                x = pairs[path][name] if path in pairs else np.zeros(like.shape, np.float32)
                writer.write((*path, name), 0, like.shape[0], x)
        runs.describe_model(folder, config, Tokenizer.load(run / runs.TOKENIZER))
        adapted.write_adapter(folder, described, seen_from=dest)
        write_json(folder / IMPORTED, value)
    return {"path": str(dest), **value}


def _write_weights(
    folder: Path, config: ModelConfig, tensors: Tensors, wanted: dict[str, Weight]
) -> None:
    shapes = Transformer(config).shapes()
    writer = WeightsWriter(folder, shapes)
    with progress("import", len(wanted)) as advance:
        for path, names in _by_parameter(wanted).items():
            weight = wanted[names[0]]
            if weight.layer is None:
                for start, stop, value in pieces(tensors, names[0], weight):
                    writer.write(path, start, stop, value)
            else:
                stack = np.empty((len(names), *weight.shape), np.float32)
                for name in names:
                    weight = wanted[name]
                    ((_, _, stack[weight.layer]),) = pieces(tensors, name, weight)
                writer.write(path, 0, len(names), stack)
            advance(len(names))


def _by_parameter(wanted: dict[str, Weight]) -> dict[tuple[str, ...], list[str]]:
    """The foreign tensors of each parameter of ours: one, or one a layer."""
    names: dict[tuple[str, ...], list[str]] = {}
    for name, weight in wanted.items():
        names.setdefault(weight.path, []).append(name)
    return names


def _reader(
    saved: Weights, advance: Callable[[int], None]
) -> Callable[[Weight], Iterator[np.ndarray]]:
    """A tensor's rows as a foreign file holds them: an embedding in pieces, all else whole."""

    def read(weight: Weight) -> Iterator[np.ndarray]:
        for start, stop in weight.cuts(weight.shape[0]):
            yield weight.to_foreign(saved.read(weight.path, weight.layer, start, stop))
        advance(1)

    return read


def _must_be_new(path: Path) -> None:
    if path.exists():
        raise UserError(f"{path} exists already; give another place, or remove it.")


@contextlib.contextmanager
def _aside(dest: Path) -> Iterator[Path]:
    """A folder beside `dest` that takes its name when all of it is written."""
    aside = dest.with_name(dest.name + PARTIAL_SUFFIX)
    with disk_errors(dest):
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        yield aside
        with disk_errors(dest):
            aside.rename(dest)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def _gguf_file(dest: Path, name: str) -> Iterator[Path]:
    """The file to write, in a new folder `dest` or as `dest` itself; a Modelfile beside it."""
    if dest.suffix != ".gguf":
        with _aside(dest) as folder:
            yield folder / name
            write_text(folder / MODELFILE, gguf.modelfile(name))
        return
    beside = dest.with_name(f"{dest.stem}.{MODELFILE}")
    _must_be_new(beside)
    aside = dest.with_name(dest.name + PARTIAL_SUFFIX)
    with disk_errors(dest):
        dest.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield aside
        aside.replace(dest)
        write_text(beside, gguf.modelfile(dest.name))
    finally:
        aside.unlink(missing_ok=True)


def _size(weights: Iterable[Weight]) -> int:
    return sum(math.prod(weight.shape) for weight in weights)


def _card(run: Path, config: ModelConfig, dtype: str) -> str:
    """The model card: what it is and, where a run says so, how it was trained."""
    count = count_parameters(config)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [gemma3, gemma_jax]",
        "---",
        f"# {run.name}",
        "",
        f"A Gemma 3 text model of {count.total:,} parameters ({count.embedding:,} of them in "
        f"embeddings), {config.num_layers} layers of the pattern `{config.attn_pattern}` with a "
        f"window of {config.sliding_window} tokens, context {config.max_seq_len}. Weights in "
        f"{dtype}, written by gemma_jax.",
    ]
    if (run / IMPORTED).exists():
        origin = read_json(run / IMPORTED, "the origin of an imported model")
        lines += [
            "",
            f"Its weights were imported from `{Path(origin['source']).name}`; the terms "
            "of that model go with them.",
        ]
    if (run / runs.EXPERIMENT).exists():
        described = read_json(run / runs.EXPERIMENT, "the settings of a run")
        settings = described["experiment"]
        result = runs.read_result(run) or {}
        lines += ["", "## Training", ""]
        lines += [
            f"- {key.replace('_', ' ')}: {settings[key]}"
            for key in ("tokens", "batch_tokens", "seq_len", "seed")
            if key in settings
        ]
        for key in ("objective", "optimizer"):
            if isinstance(settings.get(key), dict):
                lines.append(f"- {key}: {settings[key].get('type', key)}")
        if "bits_per_byte" in result:
            lines.append(f"- bits per byte on held-out text: {result['bits_per_byte']:.4f}")
        lines.append(f"- commit of gemma_jax: {described.get('commit')}")
    return "\n".join(lines) + "\n"
