"""The command line: a verb a function. Nothing here but arguments, calls and printing.

Results go to stdout (one JSON value with --json), progress and messages to stderr. Exit codes: 0
done, 2 bad input (one sentence says what and how to mend it), 130 interrupted with all work saved.
"""

import argparse
import importlib
import json
import logging
import math
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gemma_jax.errors import Interrupted, UserError
from gemma_jax.files import compilation_cache, disk_errors

type Verb = Callable[[argparse.Namespace], None]


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb and ends the process with its exit code."""
    arguments = _parser().parse_args(_joined(sys.argv[1:] if argv is None else argv))
    _quiet_libraries()
    if argv is None:  # the process is ours
        _quiet_threads()
    _use_compilation_cache()
    try:
        with disk_errors(_writes(arguments)):
            _import_uninterrupted(arguments.needs)
            arguments.run(arguments)
            sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(130)
    except KeyboardInterrupt:
        print(_STOPPED, file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output has gone: nothing left to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _quiet_threads() -> None:
    """Threads of TensorBoard and TensorStore print tracebacks after a disk error or a damaged file
    that the main thread puts into a sentence; these alone are dropped."""

    def in_thread(failure: threading.ExceptHookArgs) -> None:
        if not isinstance(failure.exc_value, OSError):
            threading.__excepthook__(failure)

    def in_callback(kind: Any, error: BaseException, trace: Any) -> None:
        if str(error) != "Event loop is closed":
            sys.__excepthook__(kind, error, trace)

    threading.excepthook, sys.excepthook = in_thread, in_callback


_STOPPED = "\nstopped; the same command goes on from the last thing saved."


def _import_uninterrupted(module: str) -> None:
    """Imports what a verb needs. Ctrl-C inside of a C++ extension's import would abort the process
    with a core dump; nothing is begun yet, so the process ends at once instead."""
    if threading.current_thread() is not threading.main_thread():
        return

    def stop(*_: Any) -> None:
        os.write(2, f"{_STOPPED}\n".encode())
        os._exit(130)

    before = signal.signal(signal.SIGINT, stop)
    try:
        importlib.import_module(module)
    finally:
        signal.signal(signal.SIGINT, before)


def _use_compilation_cache() -> None:
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(compilation_cache()))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


def _quiet_libraries() -> None:
    """Keeps what libraries tell their own developers off stderr; their errors stay."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    for name in ("absl", "asyncio", "jax", "orbax"):
        logging.getLogger(name).setLevel(logging.CRITICAL if name == "asyncio" else logging.ERROR)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")


_TWO_WORDS = {("data", "build"), ("tokenizer", "train"), ("teacher", "verify")}


# The modules that a verb imports first, where it is not all of them.
_NEEDS = {
    "data-build": "gemma_jax.data.tokens",
    "tokenizer-train": "gemma_jax.data.tokens",
    "inspect": "gemma_jax.runs",
}


def _joined(argv: Sequence[str]) -> list[str]:
    """`data build x` -> `data-build x`: argparse knows verbs of one word."""
    if tuple(argv[:2]) in _TWO_WORDS:
        return ["-".join(argv[:2]), *argv[2:]]
    return list(argv)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, like every other error of ours."""

    def error(self, message: str) -> NoReturn:
        for words in _TWO_WORDS:
            message = message.replace("-".join(words), " ".join(words))
        print(f"error: {message}; see `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


def _at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(
                f"{value} is below {least}, the smallest that it takes"
            )
        return value

    whole_number.__name__ = "whole number"  # what argparse calls it in its messages
    return whole_number


def _seed(text: str) -> int:
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is outside 0..{2**32 - 1}, the seeds there are")
    return value


_positive = _at_least(1)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="gemma-jax",
        description="Gemma 3 for research: train, distil, measure, generate.",
        epilog="Two-word verbs may be written with a space: data build, tokenizer train, "
        "teacher verify.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)

    def verb(name: str, run: Verb, help: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=help, description=help)
        one.set_defaults(run=run, needs=_NEEDS.get(name, "gemma_jax.experiment"))
        one.add_argument("--json", action="store_true", help="print one JSON value on stdout")
        return one

    one = verb("quickstart", _quickstart, "Text in, a distilled student out, and a verdict.")
    one.add_argument("file", nargs="?", help="another experiment file of the same kind")
    _settings_options(one)

    one = verb("data-build", _data_build, "Tokenise text into a token set.")
    one.add_argument("path", help="folder of the token set")
    _source_options(one)
    _tokenizer_options(one)
    one.add_argument("--tokenizer", help="a SentencePiece model, instead of training one")
    one.add_argument("--valid-fraction", type=float, default=0.01, help="share held out")
    one.add_argument("--workers", type=_positive, help="threads; all cores by default")

    one = verb("tokenizer-train", _tokenizer_train, "Train a SentencePiece model on text.")
    one.add_argument("path", help="file of the model to write")
    _source_options(one)
    _tokenizer_options(one)

    one = verb("train", _train, "Train an experiment.")
    one.add_argument("file", help="experiment file")
    one.add_argument("--point", help="a point of its SWEEP, instead of BASE")
    _settings_options(one)

    one = verb("teacher", _teacher, "Run a trained model over a token set and write its targets.")
    one.add_argument("checkpoint", help="folder of a run")
    one.add_argument("data", help="folder of a token set")
    one.add_argument("path", help="folder of the shards to write")
    one.add_argument("--seq-len", type=_at_least(2), required=True)
    one.add_argument("--draws", type=_positive, default=64, help="draws a token")
    one.add_argument("--method", default="systematic", choices=("systematic", "multinomial"))
    one.add_argument("--seed", type=_seed, default=0)
    one.add_argument("--batch-size", type=_positive, default=8, help="sequences a batch")
    one.add_argument("--num-sequences", type=_positive, help="all of the training split by default")

    one = verb(
        "teacher-verify", _teacher_verify, "Read shards again from end to end and check them."
    )
    one.add_argument("path", help="folder of the shards")
    one.add_argument("--checkpoint", help="the teacher's run, to recompute a sample of records")
    one.add_argument("--sample", type=_positive, default=32, help="records to recompute")

    one = verb("sweep", _sweep, "Run every point of an experiment file's SWEEP.")
    one.add_argument("file", help="experiment file")
    one.add_argument("--seeds", help="seeds instead of the file's, such as 0,1,2")
    _settings_options(one)

    one = verb("eval", _eval, "Bits per byte, perplexity and accuracy on text.")
    one.add_argument("checkpoint", help="folder of a run")
    one.add_argument("--data", help="folder of a token set: its validation split")
    _source_options(one, required=False)
    one.add_argument("--seq-len", type=_at_least(2), help="tokens a sequence; the run's by default")
    one.add_argument("--batch-size", type=_positive, default=8, help="sequences a batch")

    one = verb("generate", _generate, "Continue prompts.")
    one.add_argument("checkpoint", help="folder of a run")
    one.add_argument("--prompt", action="append", required=True, help="may be given several times")
    one.add_argument("--max-new-tokens", type=_positive, default=64)
    one.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    one.add_argument("--top-k", type=_positive)
    one.add_argument("--top-p", type=float)
    one.add_argument("--seed", type=_seed, default=0)

    one = verb("inspect", _inspect, "Layers, shapes, parameters, FLOPs and cache of a model.")
    one.add_argument("what", help="an experiment file, the name of a preset, or a run's folder")
    one.add_argument("--seq-len", type=_at_least(2), help="tokens a sequence for the FLOPs")
    _settings_options(one)
    return parser


def _writes(arguments: argparse.Namespace) -> str:
    """The place named when the disk is full and no closer one is known."""
    return str(getattr(arguments, "path", None) or Path.cwd())


def _settings_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change a setting"
    )
    parser.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="argument of the file"
    )


def _source_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--source",
        action="append",
        required=required,
        help="file, glob, folder, hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT or stdlib; may be "
        "given several times",
    )
    parser.add_argument("--text-field", default="text", help="field of JSON lines and Parquet")


def _tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab-size", type=_positive, default=8192)


def _print(arguments: argparse.Namespace, value: Any, text: str | None = None) -> None:
    if arguments.json or text is None:
        indent = None if arguments.json else 2
        print(json.dumps(_finite(value), indent=indent, ensure_ascii=False, allow_nan=False))
    else:
        print(text)


def _finite(value: Any) -> Any:
    """`value` with null for every number that JSON cannot hold (NaN, infinity)."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _quickstart(arguments: argparse.Namespace) -> None:
    from gemma_jax import quickstart

    path = Path(arguments.file) if arguments.file else quickstart.FILE
    sweep = _load_sweep(path, arguments)
    summary = quickstart.quickstart(sweep)
    _print(arguments, summary, quickstart.report(summary))


def _data_build(arguments: argparse.Namespace) -> None:
    from gemma_jax.data.tokenizer import TokenizerConfig
    from gemma_jax.data.tokens import Corpus, build_tokens

    corpus = Corpus(
        path=arguments.path,
        sources=tuple(arguments.source),
        tokenizer=arguments.tokenizer or TokenizerConfig(vocab_size=arguments.vocab_size),
        text_field=arguments.text_field,
        valid_fraction=arguments.valid_fraction,
    )
    _print(arguments, build_tokens(corpus, arguments.workers).manifest)


def _tokenizer_train(arguments: argparse.Namespace) -> None:
    from gemma_jax.data.corpora import iter_documents
    from gemma_jax.data.tokenizer import TokenizerConfig, train_tokenizer

    texts = iter_documents(tuple(arguments.source), text_field=arguments.text_field)
    config = TokenizerConfig(vocab_size=arguments.vocab_size)
    tokenizer = train_tokenizer((document.text for document in texts), config, arguments.path)
    value = {"path": arguments.path, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash}
    _print(arguments, value)


def _train(arguments: argparse.Namespace) -> None:
    from gemma_jax.experiment import run

    if arguments.point is not None:
        sweep = _load_sweep(Path(arguments.file), arguments)
        if arguments.point not in sweep.points:
            known = ", ".join(sweep.points)
            raise UserError(f"there is no point '{arguments.point}'; there are: {known}.")
        experiment = sweep.experiment(arguments.point, sweep.seeds[0])
    else:
        experiment = _load_base(Path(arguments.file), arguments)
    result = run(experiment)
    _print(arguments, result, _result_text(result, experiment.folder))


def _result_text(result: dict[str, Any], folder: Path) -> str:
    return (
        f"{result['name']}: {result['bits_per_byte']:.4f} bits/byte, loss {result['loss']:.4f}, "
        f"accuracy {result['accuracy']:.4f} on held-out text after {result['tokens']:,} tokens "
        f"({result['tokens_per_s'] or 0:,.0f} tokens/s); see {folder}"
    )


def _teacher(arguments: argparse.Namespace) -> None:
    from gemma_jax.data.tokens import TokenSet
    from gemma_jax.distill.teacher import TeacherJob
    from gemma_jax.trained import write_shards

    job = TeacherJob(
        path=arguments.path,
        draws=arguments.draws,
        method=arguments.method,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    manifest = write_shards(
        job,
        arguments.checkpoint,
        TokenSet.open(arguments.data),
        seq_len=arguments.seq_len,
        num_sequences=arguments.num_sequences,
    )
    _print(arguments, manifest)


def _teacher_verify(arguments: argparse.Namespace) -> None:
    from gemma_jax.trained import verify_shards

    _print(arguments, verify_shards(arguments.path, arguments.checkpoint, arguments.sample))


def _sweep(arguments: argparse.Namespace) -> None:
    from gemma_jax.sweep import markdown, run_sweep

    sweep = _load_sweep(Path(arguments.file), arguments)
    rows = run_sweep(sweep)
    text = f"{markdown(rows)}\n{sweep.folder}/results.csv, results.md, results.png"
    _print(arguments, rows, text)


def _eval(arguments: argparse.Namespace) -> None:
    from gemma_jax.trained import evaluate

    result = evaluate(
        arguments.checkpoint,
        data=arguments.data,
        sources=tuple(arguments.source or ()),
        text_field=arguments.text_field,
        seq_len=arguments.seq_len,
        batch_size=arguments.batch_size,
    )
    _print(arguments, result)


def _generate(arguments: argparse.Namespace) -> None:
    from gemma_jax.generation.sampling import Sampling
    from gemma_jax.trained import complete

    sampling = Sampling(
        temperature=arguments.temperature, top_k=arguments.top_k, top_p=arguments.top_p
    )
    texts = complete(
        arguments.checkpoint,
        arguments.prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
    )
    _print(
        arguments,
        [{"prompt": p, "text": t} for p, t in zip(arguments.prompt, texts, strict=True)],
        "\n\n".join(p + t for p, t in zip(arguments.prompt, texts, strict=True)),
    )


def _inspect(arguments: argparse.Namespace) -> None:
    from gemma_jax.model import summary
    from gemma_jax.model.config import PRESETS
    from gemma_jax.runs import MODEL, read_config
    from gemma_jax.settings import override, parse_assignments

    what, seq_len = arguments.what, arguments.seq_len
    if arguments.arg and not what.endswith(".py"):
        raise UserError(f"--arg is for experiment files, and '{what}' is none; leave it out.")
    if what in PRESETS:
        config = override(PRESETS[what](), parse_assignments(arguments.set, {}))
    elif (Path(what) / MODEL).exists():
        config = override(read_config(Path(what) / MODEL), parse_assignments(arguments.set, {}))
    elif what.endswith(".py"):
        experiment = _load_base(Path(what), arguments)
        config, seq_len = experiment.model, seq_len or experiment.seq_len
    else:
        raise UserError(
            f"'{what}' is no preset ({', '.join(PRESETS)}), no folder of a run and no experiment "
            "file."
        )
    if seq_len is not None and seq_len > config.max_seq_len:
        raise UserError(
            f"--seq-len {seq_len} is over the model's context, {config.max_seq_len} tokens; "
            "shorten it, or extend max_seq_len."
        )
    described = summary.describe(config, seq_len or min(2048, config.max_seq_len))
    _print(arguments, described, summary.text(described))


def _load_file(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    from gemma_jax.experiment_file import load_file
    from gemma_jax.settings import parse_assignments

    return load_file(path, parse_assignments(arguments.arg, {}))


def _changes(arguments: argparse.Namespace) -> dict[str, Any]:
    from gemma_jax.experiment import SETTINGS
    from gemma_jax.settings import parse_assignments

    return parse_assignments(arguments.set, SETTINGS)


def _load_base(path: Path, arguments: argparse.Namespace) -> Any:
    from gemma_jax.settings import override

    defined = _load_file(path, arguments)
    base = defined["BASE"] if "BASE" in defined else defined["SWEEP"].base
    return override(base, _changes(arguments))


def _load_sweep(path: Path, arguments: argparse.Namespace) -> Any:
    import dataclasses

    from gemma_jax.settings import override

    defined = _load_file(path, arguments)
    if "SWEEP" not in defined:
        raise UserError(f"{path} defines no SWEEP; use `gemma-jax train {path}`.")
    sweep = defined["SWEEP"]
    seeds = sweep.seeds
    if getattr(arguments, "seeds", None) is not None:
        try:
            seeds = tuple(_seed(seed) for seed in arguments.seeds.split(","))
        except (ValueError, argparse.ArgumentTypeError):
            raise UserError(
                f"--seeds '{arguments.seeds}' must be whole numbers from 0 on, with commas, "
                "such as 0,1,2."
            ) from None
    return dataclasses.replace(sweep, base=override(sweep.base, _changes(arguments)), seeds=seeds)
