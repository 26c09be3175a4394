"""Runs jobs in llama.cpp: `python run_llama_cpp.py JOBS.json`.

A job is {"model": file, "tokens": [[id, ...], ...], "out": folder}. For text i it writes
out/logits_i.npy [T, V], or with "losses": true out/losses_i.npy [T - 1], the nats of each token
after the first; where llama.cpp refuses the model, out/error.txt. Keys and values are kept
in float32, all else is its default. {"quantize": "q4_0" | "q8_0", "rows": file.npy, "out": folder}
writes out/blocks.npy instead, the bytes of its own quantiser. {"model": file, "texts": [text, ...],
"out": folder} writes out/ids.json, the ids of each without BOS.

xllamacpp's server gives no logits of a prompt, so this calls the C library inside that package.
Structures passed by value are blobs: only the fields named below are known, and their defaults are
checked before any is changed. Knows nothing of gemma_jax.
"""

import ctypes
import json
import multiprocessing
import os
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import xllamacpp

TYPES = {"q4_0": 2, "q8_0": 8}
# Offset in llama_context_params, default, wanted value.
F16, F32 = 1, 0
CACHE_TYPES = [(104, F16, F32), (108, F16, F32)]


class Params(ctypes.Structure):
    """At least as large as any of llama.cpp's; by value it is copied to the stack whole."""

    _fields_ = (("words", ctypes.c_int32 * 128),)


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    )


def library() -> ctypes.CDLL:
    folder = Path(xllamacpp.__file__).parent
    lib = ctypes.CDLL(str(next(folder.glob("xllamacpp*.so"))))
    pointer = ctypes.c_void_p
    for name, result, *arguments in (
        ("llama_model_default_params", Params),
        ("llama_context_default_params", Params),
        ("llama_model_load_from_file", pointer, ctypes.c_char_p, Params),
        ("llama_init_from_model", pointer, pointer, Params),
        ("llama_model_get_vocab", pointer, pointer),
        ("llama_vocab_n_tokens", ctypes.c_int32, pointer),
        (
            *("llama_tokenize", ctypes.c_int32, pointer, ctypes.c_char_p, ctypes.c_int32),
            *(ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool),
        ),
        ("llama_batch_init", Batch, ctypes.c_int32, ctypes.c_int32, ctypes.c_int32),
        ("llama_decode", ctypes.c_int32, pointer, Batch),
        ("llama_get_logits", ctypes.POINTER(ctypes.c_float), pointer),
        ("llama_batch_free", None, Batch),
        ("llama_free", None, pointer),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = (
        *(ctypes.c_int, pointer, pointer),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, pointer),
    )
    return lib


def context_params(lib: ctypes.CDLL, tokens: int) -> Params:
    params = lib.llama_context_default_params()
    if list(params.words[:4]) != [512, 2048, 512, 1]:  # n_ctx, n_batch, n_ubatch, n_seq_max
        raise ValueError("llama_context_params begins with other fields in this version")
    params.words[0] = params.words[1] = params.words[2] = tokens
    for offset, default, wanted in CACHE_TYPES:
        if params.words[offset // 4] != default:
            raise ValueError("llama_context_params has other fields in this version")
        params.words[offset // 4] = wanted
    return params


def logits(lib: ctypes.CDLL, model: int, ids: list[int]) -> np.ndarray:
    context = lib.llama_init_from_model(model, context_params(lib, max(len(ids), 32)))
    if not context:
        raise ValueError("llama.cpp makes no context for the model")
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    if lib.llama_decode(context, batch):
        raise ValueError("llama.cpp cannot run the model")
    size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    values = np.ctypeslib.as_array(lib.llama_get_logits(context), (len(ids), size)).copy()
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return values


def tokenise(lib: ctypes.CDLL, vocabulary: int, text: bytes) -> list[int]:
    """Names of control pieces stay text."""
    room = (ctypes.c_int32 * (len(text) + 8))()
    count = lib.llama_tokenize(vocabulary, text, len(text), room, len(room), False, False)
    if count < 0:
        raise ValueError(f"llama.cpp wants {-count} tokens for {len(text)} bytes")
    return list(room[:count])


def run(job: dict) -> None:
    lib, out = library(), Path(job["out"])
    if "quantize" in job:
        rows = np.ascontiguousarray(np.load(job["rows"]), np.float32)
        blocks = np.zeros(rows.nbytes, np.uint8)
        kind, (n, width) = TYPES[job["quantize"]], rows.shape
        data = rows.ctypes.data, blocks.ctypes.data
        size = lib.ggml_quantize_chunk(kind, *data, 0, n, width, None)
        np.save(out / "blocks.npy", blocks[:size].reshape(n, -1))
        return
    model = lib.llama_model_load_from_file(
        os.fsencode(job["model"]), lib.llama_model_default_params()
    )
    if not model:
        (out / "error.txt").write_text("llama.cpp does not load the model\n")
        return
    if "texts" in job:
        vocabulary = lib.llama_model_get_vocab(model)
        ids = [tokenise(lib, vocabulary, text.encode()) for text in job["texts"]]
        (out / "ids.json").write_text(json.dumps(ids))
        return
    for i, ids in enumerate(job["tokens"]):
        values = logits(lib, model, ids)
        if job.get("losses"):
            np.save(out / f"losses_{i}.npy", losses(values, ids))
        else:
            np.save(out / f"logits_{i}.npy", values)


def losses(values: np.ndarray, ids: list[int]) -> np.ndarray:
    rows = []
    for row, label in zip(values[:-1], ids[1:], strict=True):
        row = row.astype(np.float64)
        rows.append(np.log(np.exp(row - row.max()).sum()) + row.max() - row[label])
    return np.array(rows)


def main() -> None:
    print(f"xllamacpp {metadata.version('xllamacpp')}")
    for job in json.loads(Path(sys.argv[1]).read_text()):
        out = Path(job["out"])
        out.mkdir(parents=True, exist_ok=True)
        # llama.cpp ends the process where an assertion of its fails.
        process = multiprocessing.get_context("fork").Process(target=run, args=(job,))
        process.start()
        process.join()
        if process.exitcode and not (out / "error.txt").exists():
            (out / "error.txt").write_text(f"llama.cpp ended with {process.exitcode}\n")


if __name__ == "__main__":
    main()
