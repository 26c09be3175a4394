"""Tokens a second of each exported file in llama.cpp, a text at a time on this machine's processor.

Run     ./launch.sh test clients --collect-only      # makes .venv-clients, once
        .venv-clients/llama_cpp/bin/python experiments/tuning/llama_cpp_speed.py \\
            runs/tuning/trec/gguf [--tokens 128] [--repeats 3]
Then    .venv/bin/python experiments/tuning/comparison_table.py runs/tuning/trec

Writes NAME.speed.json beside each NAME.gguf: the median of the repeats, and all of them. Knows
nothing of gemma_jax: llama.cpp has an environment of its own.
"""

import argparse
import json
import os
import statistics
from importlib import metadata
from pathlib import Path

import xllamacpp

PROMPT = "Personal data in: Please call me back, I have a question about my order."


def speeds(path: Path, tokens: int, repeats: int, threads: int) -> list[float]:
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(path), 1024, 1
    params.cpuparams.n_threads, params.verbosity = threads, -1
    server = xllamacpp.Server(params)
    asked = {"prompt": PROMPT, "n_predict": tokens, "temperature": 0, "ignore_eos": True}
    found = []
    for _ in range(repeats + 1):  # the first one warms up
        answer = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        found.append(answer["timings"]["predicted_per_second"])
    return found[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    for option, default in (("tokens", 128), ("repeats", 3), ("threads", os.cpu_count() or 1)):
        parser.add_argument(f"--{option}", type=int, default=default)
    arguments = parser.parse_args()
    for path in sorted(arguments.folder.glob("*.gguf")):
        found = speeds(path, arguments.tokens, arguments.repeats, arguments.threads)
        value = {
            "tokens_per_s": statistics.median(found),
            "repeats": found,
            "bytes": path.stat().st_size,
            "threads": arguments.threads,
            "xllamacpp": metadata.version("xllamacpp"),
        }
        path.with_suffix(".speed.json").write_text(json.dumps(value, indent=2) + "\n")
        print(f"{path.stem:<16}{value['tokens_per_s']:8.1f} tokens/s", flush=True)


if __name__ == "__main__":
    main()
