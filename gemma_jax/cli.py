"""The command line: a verb a function. Nothing here but calls and printing.

Results go to stdout (one JSON value with --json), progress and messages to stderr. Exit codes: 0
done, 2 bad input (one sentence says what and how to mend it), 130 interrupted with all work saved,
75 the same by SIGTERM: whoever started it should start it again.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from gemma_jax import cli_bench, cli_eval, cli_machines, cli_models, cli_plan, report
from gemma_jax.arguments import parse
from gemma_jax.cli_files import load_base, load_point, load_sweep, load_sweep_file
from gemma_jax.errors import (
    INTERRUPTED_CODE,
    PREEMPTED_CODE,
    STOPPED,
    Interrupted,
    Preempted,
    Terminated,
    UserError,
)
from gemma_jax.files import disk_errors
from gemma_jax.process import (
    import_uninterrupted,
    join_processes,
    quiet_libraries,
    quiet_threads,
    stop_by_exception,
    use_compilation_cache,
)

# The modules that a verb imports first, where it is not all of them.
_NEEDS = {
    "data build": "gemma_jax.data.tokens",
    "tokenizer train": "gemma_jax.data.tokens",
    "inspect": "gemma_jax.runs",
    "bench": "gemma_jax.bench.run",
    "plan": "gemma_jax.plan.search",
    "generate": "gemma_jax.completion",
    "import": "gemma_jax.exchange",
    "export": "gemma_jax.exchange",
    "tpu": "gemma_jax.machines.tpu",  # no jax: these work on a laptop that has none of its devices
    "gke": "gemma_jax.machines.gke",
    "slurm": "gemma_jax.machines.slurm",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one verb and ends the process with its exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    quiet_libraries()
    if argv is None:  # the process is ours
        quiet_threads()
    use_compilation_cache()
    try:
        with stop_by_exception():
            _run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(f"\n{stop}", file=sys.stderr)
        sys.exit(PREEMPTED_CODE if isinstance(stop, Preempted) else INTERRUPTED_CODE)
    except KeyboardInterrupt as stop:
        print(f"\n{STOPPED}", file=sys.stderr)
        sys.exit(PREEMPTED_CODE if isinstance(stop, Terminated) else INTERRUPTED_CODE)
    except BrokenPipeError:  # the reader of our output has gone: nothing left to tell it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(arguments: argparse.Namespace) -> None:
    if _joins(arguments):
        join_processes(arguments.coordinator, arguments.num_processes, arguments.process_id)
    try:
        with disk_errors(_writes(arguments), full_only=True):
            import_uninterrupted(_NEEDS.get(arguments.verb, "gemma_jax.experiment"))
            _VERBS[arguments.verb](arguments)
            sys.stdout.flush()
    except Exception as error:
        # A process that is stopped breaks off what others do together with it.
        stops = sys.modules.get("gemma_jax.stops")
        if stops is None or not stops.noticed() or isinstance(error, (UserError, Interrupted)):
            raise
        raise stops.stopped(stops.noticed()) from error


def _joins(arguments: argparse.Namespace) -> bool:
    """Whether a command is to be run by several processes together, if its verb can be."""
    if not hasattr(arguments, "distributed"):
        return False
    given = (arguments.coordinator, arguments.num_processes, arguments.process_id)
    asked = arguments.distributed or any(value is not None for value in given)
    return asked or "JAX_COORDINATOR_ADDRESS" in os.environ


def _writes(arguments: argparse.Namespace) -> str:
    """The place named when the disk is full and no closer one is known."""
    return str(getattr(arguments, "path", None) or Path.cwd())


def _quickstart(arguments: argparse.Namespace) -> None:
    from gemma_jax import quickstart

    path = Path(arguments.file) if arguments.file else quickstart.default_file()
    sweep = load_sweep(path, arguments)
    summary = quickstart.quickstart(sweep)
    report.emit(arguments, summary, quickstart.report(summary))


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
    manifest = build_tokens(corpus, arguments.workers).manifest
    report.emit(arguments, manifest, report.tokens(manifest, arguments.path))


def _tokenizer_train(arguments: argparse.Namespace) -> None:
    from gemma_jax.data.corpora import iter_documents
    from gemma_jax.data.tokenizer import TokenizerConfig
    from gemma_jax.data.tokenizer_training import train_tokenizer

    sources = tuple(arguments.source)
    texts = iter_documents(sources, arguments.text_field, show_progress=True)
    config = TokenizerConfig(vocab_size=arguments.vocab_size)
    tokenizer = train_tokenizer((document.text for document in texts), config, arguments.path)
    value = {"path": arguments.path, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash}
    report.emit(arguments, value, report.figures(value))


def _train(arguments: argparse.Namespace) -> None:
    from gemma_jax.experiment import run

    experiment = load_point(arguments)
    if arguments.replay is not None:
        from gemma_jax.replay import replay

        seen = replay(experiment, arguments.replay)
        report.emit(arguments, seen, report.replay(seen))
        return
    result = run(experiment)
    report.emit(arguments, result, report.run(result, experiment.folder))


def _teacher(arguments: argparse.Namespace) -> None:
    from gemma_jax.data.tokens import TokenSet
    from gemma_jax.distill.teacher import TeacherJob
    from gemma_jax.sharding import MeshConfig
    from gemma_jax.trained import write_shards

    job = TeacherJob(
        path=arguments.path,
        draws=arguments.draws,
        method=arguments.method,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
        mesh=cli_models.mesh(arguments) or MeshConfig(),
    )
    manifest = write_shards(
        job,
        arguments.checkpoint,
        TokenSet.open(arguments.data),
        seq_len=arguments.seq_len,
        num_sequences=arguments.num_sequences,
    )
    report.emit(arguments, manifest, report.shards(manifest, arguments.path))


def _teacher_verify(arguments: argparse.Namespace) -> None:
    from gemma_jax.trained import verify_shards

    found = verify_shards(
        arguments.path, arguments.checkpoint, arguments.sample, cli_models.mesh(arguments)
    )
    report.emit(arguments, found, report.figures(found))


def _sweep(arguments: argparse.Namespace) -> None:
    from gemma_jax.sweep import markdown, run_sweep, tabulate

    sweep, after = load_sweep_file(Path(arguments.file), arguments)
    if arguments.list:
        report.emit(arguments, list(sweep.points), "\n".join(sweep.points))
        return
    if arguments.only:
        rows = run_sweep(sweep, arguments.only)
        report.emit(arguments, rows, markdown(rows))
        return
    if arguments.collect is not None:
        from gemma_jax.machines.results import collect
        from gemma_jax.machines.shell import Shell
        from gemma_jax.runs import RUNS

        collect(arguments.collect, sweep.base.name, RUNS, Shell())
        rows = tabulate(sweep)
    else:
        rows = run_sweep(sweep)
    text = f"{markdown(rows)}\n{sweep.folder}/results.csv, results.md, results.png"
    if after is not None and arguments.collect is None:
        text = f"{text}\n\n{after(sweep)}"
    report.emit(arguments, rows, text)


def _inspect(arguments: argparse.Namespace) -> None:
    from gemma_jax.model import summary
    from gemma_jax.model.config import PRESETS
    from gemma_jax.runs import MODEL, no_run, read_config
    from gemma_jax.settings import override, parse_assignments

    what, seq_len = arguments.what, arguments.seq_len
    if arguments.arg and not what.endswith(".py"):
        raise UserError(f"--arg is for experiment files, and '{what}' is none; leave it out.")
    if what in PRESETS:
        config = override(PRESETS[what](), parse_assignments(arguments.set, {}))
    elif (Path(what) / MODEL).exists():
        config = override(read_config(Path(what) / MODEL), parse_assignments(arguments.set, {}))
    elif what.endswith(".py"):
        experiment = load_base(Path(what), arguments)
        config, seq_len = experiment.model, seq_len or experiment.seq_len
    elif Path(what).is_dir():
        raise no_run(Path(what))
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
    report.emit(arguments, described, report.cut_off(described["model"]) + summary.text(described))


def _plan(arguments: argparse.Namespace) -> None:
    cli_plan.plan(arguments, load_point(arguments))


_VERBS: dict[str, Callable[[argparse.Namespace], None]] = {
    "quickstart": _quickstart,
    "data build": _data_build,
    "tokenizer train": _tokenizer_train,
    "train": _train,
    "teacher": _teacher,
    "teacher verify": _teacher_verify,
    "sweep": _sweep,
    "eval": cli_eval.evaluate,
    "generate": cli_models.generate,
    "import": cli_models.import_,
    "export": cli_models.export,
    "inspect": _inspect,
    "bench": cli_bench.bench,
    "plan": _plan,
    "tpu": cli_machines.tpu,
    "gke": cli_machines.gke,
    "slurm": cli_machines.slurm,
}
