"""What the command line takes: its verbs, their arguments and help. What they do is in `cli.py`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gemma_jax.arguments_bench import add_bench, add_plan
from gemma_jax.arguments_eval import add_eval
from gemma_jax.arguments_machines import add_machines
from gemma_jax.options import (
    at_least,
    device_options,
    positive,
    seed,
    settings_options,
    source_options,
    tokenizer_options,
)

TWO_WORDS = ("data build", "tokenizer train", "teacher verify")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; `verb` is its verb, of two words where it has them."""
    return parser().parse_args(_joined(argv))


def _joined(argv: Sequence[str]) -> list[str]:
    """`data build x` with its verb as one argument, as argparse wants it."""
    for verb in TWO_WORDS:
        first, second = words = verb.split()
        if list(argv[:2]) == words:
            return [verb, *argv[2:]]
        if list(argv[:1]) == ["-".join(words)]:
            return [verb, *argv[1:]]
        if first != "teacher" and argv[:1] == [first]:  # a teacher is a verb of its own
            if argv[1:2] in (["-h"], ["--help"]):
                return [verb, *argv[1:]]
            parser().error(f"'{first}' needs its second word: {first} {second}")
    return list(argv)


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence, like every other error of ours."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; see `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


class _Help(argparse.HelpFormatter):
    """Shows the default of each option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        plain = action.default in (None, [], argparse.SUPPRESS) or action.default is False
        if plain or not action.option_strings:
            return action.help
        return f"{action.help} (default: %(default)s)"


def parser() -> argparse.ArgumentParser:
    whole = _Parser(
        prog="gemma-jax",
        description="Gemma 3 for research: train, distil, measure, generate.",
    )
    verbs = whole.add_subparsers(dest="verb", metavar="VERB", required=True)

    def verb(name: str, help: str) -> argparse.ArgumentParser:
        one = verbs.add_parser(name, help=help, description=help)
        one.add_argument("--json", action="store_true", help="print one JSON value on stdout")
        return one

    one = verb("quickstart", "Text in, a distilled student out, and a verdict.")
    one.add_argument("file", nargs="?", help="another experiment file of the same kind")
    settings_options(one)
    device_options(one, mesh_too=False)

    one = verb("data build", "Tokenise text into a token set.")
    one.add_argument("path", help="folder of the token set")
    source_options(one)
    tokenizer_options(one)
    one.add_argument("--tokenizer", help="a SentencePiece model, instead of training one")
    one.add_argument("--valid-fraction", type=float, default=0.01, help="share held out")
    one.add_argument("--workers", type=positive, help="threads; all cores by default")

    one = verb("tokenizer train", "Train a SentencePiece model on text.")
    one.add_argument("path", help="file of the model to write")
    source_options(one)
    tokenizer_options(one)

    one = verb("train", "Train an experiment.")
    one.add_argument("file", help="experiment file")
    one.add_argument("--point", help="a point of its SWEEP, instead of BASE")
    one.add_argument(
        "--replay",
        type=positive,
        metavar="STEP",
        help="run this step of the run once more, from the state before it, and tell of it",
    )
    settings_options(one)
    device_options(one, mesh_too=False)

    one = verb("teacher", "Run a trained model over a token set and write its targets.")
    one.add_argument("checkpoint", help="folder of a run")
    one.add_argument("data", help="folder of a token set")
    one.add_argument("path", help="folder of the shards to write")
    one.add_argument("--seq-len", type=at_least(2), required=True, help="tokens a sequence")
    one.add_argument("--draws", type=positive, default=64, help="draws a token")
    one.add_argument(
        "--method",
        default="systematic",
        choices=("systematic", "multinomial"),
        help="how they are drawn: systematic varies less",
    )
    one.add_argument("--seed", type=seed, default=0, help="of the draws and of the order")
    one.add_argument("--batch-size", type=positive, default=8, help="sequences a batch")
    one.add_argument("--num-sequences", type=positive, help="all of the training split by default")
    device_options(one)

    _verbs_of_what_is_made(verb)
    add_machines(verbs.add_parser)
    return whole


def _verbs_of_what_is_made(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    one = verb("teacher verify", "Read shards again from end to end and check them.")
    one.add_argument("path", help="folder of the shards")
    one.add_argument("--checkpoint", help="the teacher's run, to recompute a sample of records")
    one.add_argument("--sample", type=positive, default=32, help="records to recompute")
    device_options(one)

    one = verb("sweep", "Run every point of an experiment file's SWEEP.")
    one.add_argument("file", help="experiment file")
    one.add_argument("--seeds", help="seeds instead of the file's, such as 0,1,2")
    part = one.add_mutually_exclusive_group()
    part.add_argument(
        "--only", action="append", metavar="POINT", help="this point alone, without the tables"
    )
    part.add_argument("--list", action="store_true", help="print the points and run none")
    part.add_argument(
        "--collect",
        metavar="RUNS",
        help="run none: bring results from there (gs://... or a folder that holds runs) and make "
        "the tables of what is finished",
    )
    settings_options(one)
    device_options(one, mesh_too=False)

    one = verb("eval", "Bits per byte on text, scores on tasks, or what replies are worth.")
    one.add_argument("checkpoint", help="folder of a run")
    one.add_argument("--data", help="folder of a token set: its validation split")
    source_options(one, required=False)
    one.add_argument("--seq-len", type=at_least(2), help="tokens a sequence; the run's by default")
    one.add_argument("--batch-size", type=positive, default=8, help="sequences a batch")
    add_eval(one)
    device_options(one)

    _model_verbs(verb)

    one = verb("inspect", "Layers, shapes, parameters, FLOPs and cache of a model.")
    one.add_argument("what", help="an experiment file, the name of a preset, or a run's folder")
    one.add_argument("--seq-len", type=at_least(2), help="tokens a sequence for the FLOPs")
    settings_options(one)

    add_bench(verb("bench", "Tokens a second, memory, compile time; beside other libraries."))
    add_plan(verb("plan", "Memory and least time of a step on hardware that is not here."))


def _model_verbs(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    one = verb("generate", "Continue prompts, or talk.")
    one.add_argument("checkpoint", help="folder of a run or of an imported model")
    what = one.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", action="append", help="may be given several times")
    what.add_argument("--file", help="JSON lines with `prompt`, or `messages` of a conversation")
    what.add_argument("--chat", action="store_true", help="a turn for each line of standard input")
    one.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="[NAME=]RUN",
        help="a run that holds an adapter on this model; may be given several times, and the lines "
        "of --file then name theirs as `adapter` (the folder's name where none is given)",
    )
    one.add_argument("--max-new-tokens", type=positive, default=64, help="at most")
    one.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    one.add_argument("--top-k", type=positive, help="draw from the likeliest K tokens alone")
    one.add_argument("--top-p", type=float, help="draw from the likeliest that make up this share")
    one.add_argument("--min-p", type=float, help="drop what is less likely than this x the best")
    one.add_argument("--repetition-penalty", type=float, help="over 1: say again less often")
    one.add_argument(
        "--stop", action="append", default=[], help="a text that ends; may be given several times"
    )
    bound = one.add_mutually_exclusive_group()
    bound.add_argument("--schema", metavar="FILE", help="write JSON that this JSON schema allows")
    bound.add_argument("--regex", help="write text that matches this expression as a whole")
    bound.add_argument("--grammar", metavar="FILE", help="write text of this grammar (Lark)")
    one.add_argument(
        "--on-limit",
        choices=("close", "cut"),
        default="close",
        help="of a bound text that --max-new-tokens ends: close it properly, or leave it as it is; "
        "lines of --file may have a `schema`, `regex` or `grammar` of their own",
    )
    one.add_argument("--logprobs", action="store_true", help="tokens and their log-probabilities")
    one.add_argument("--seed", type=seed, default=0, help="of the first prompt; then one more each")
    device_options(one)

    one = verb("import", "Take a Hugging Face folder, a GGUF file or a PEFT adapter in as a run.")
    one.add_argument(
        "source", help="folder with config.json or adapter_config.json, or a .gguf file"
    )
    one.add_argument("path", help="folder to write")
    one.add_argument("--base", help="of an adapter: the run that it belongs to")

    one = verb("export", "Write a model for transformers, mlx-lm, llama.cpp, Ollama.")
    one.add_argument("checkpoint", help="folder of a run, or one of its checkpoints")
    one.add_argument("path", help="folder to write; with gguf also a file that ends in .gguf")
    one.add_argument("--format", required=True, choices=("hf", "gguf", "peft"), help="whose files")
    one.add_argument(
        "--dtype",
        default="bf16",
        choices=("f32", "bf16", "f16", "q8_0", "q4_0"),
        help="of the matrices; q8_0 and q4_0 are GGUF's",
    )
