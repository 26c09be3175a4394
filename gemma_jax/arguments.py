"""What the command line takes: its verbs, their arguments and help. What they do is in `cli.py`."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from gemma_jax.arguments_eval import add_eval
from gemma_jax.arguments_machines import add_machines

TWO_WORDS = ("data build", "tokenizer train", "teacher verify")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; `verb` is its verb, of two words where it has them."""
    return parser().parse_args(_joined(argv))


def seed(text: str) -> int:
    """The type of a seed; also of those that `--seeds` lists."""
    if not 0 <= (value := int(text)) < 2**32:
        raise argparse.ArgumentTypeError(f"{value} is outside 0..{2**32 - 1}, the seeds there are")
    return value


def mesh(text: str) -> dict[str, Any]:
    """The type of `--mesh`: the settings of a mesh by name."""
    known = ("data", "fsdp", "tensor", "rules")
    settings: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known or not value or name in settings:
            raise argparse.ArgumentTypeError(
                f"'{text}' is no mesh; give some of {', '.join(known)}, as in fsdp=4,tensor=2"
            )
        try:
            settings[name] = value if name == "rules" else int(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{part} must be a whole number") from None
    return settings


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


_positive = _at_least(1)


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
    _settings_options(one)
    _device_options(one, mesh_too=False)

    one = verb("data build", "Tokenise text into a token set.")
    one.add_argument("path", help="folder of the token set")
    _source_options(one)
    _tokenizer_options(one)
    one.add_argument("--tokenizer", help="a SentencePiece model, instead of training one")
    one.add_argument("--valid-fraction", type=float, default=0.01, help="share held out")
    one.add_argument("--workers", type=_positive, help="threads; all cores by default")

    one = verb("tokenizer train", "Train a SentencePiece model on text.")
    one.add_argument("path", help="file of the model to write")
    _source_options(one)
    _tokenizer_options(one)

    one = verb("train", "Train an experiment.")
    one.add_argument("file", help="experiment file")
    one.add_argument("--point", help="a point of its SWEEP, instead of BASE")
    one.add_argument(
        "--replay",
        type=_positive,
        metavar="STEP",
        help="run this step of the run once more, from the state before it, and tell of it",
    )
    _settings_options(one)
    _device_options(one, mesh_too=False)

    one = verb("teacher", "Run a trained model over a token set and write its targets.")
    one.add_argument("checkpoint", help="folder of a run")
    one.add_argument("data", help="folder of a token set")
    one.add_argument("path", help="folder of the shards to write")
    one.add_argument("--seq-len", type=_at_least(2), required=True, help="tokens a sequence")
    one.add_argument("--draws", type=_positive, default=64, help="draws a token")
    one.add_argument(
        "--method",
        default="systematic",
        choices=("systematic", "multinomial"),
        help="how they are drawn: systematic varies less",
    )
    one.add_argument("--seed", type=seed, default=0, help="of the draws and of the order")
    one.add_argument("--batch-size", type=_positive, default=8, help="sequences a batch")
    one.add_argument("--num-sequences", type=_positive, help="all of the training split by default")
    _device_options(one)

    _verbs_of_what_is_made(verb)
    add_machines(verbs.add_parser, _positive)
    return whole


def _verbs_of_what_is_made(verb: Callable[[str, str], argparse.ArgumentParser]) -> None:
    one = verb("teacher verify", "Read shards again from end to end and check them.")
    one.add_argument("path", help="folder of the shards")
    one.add_argument("--checkpoint", help="the teacher's run, to recompute a sample of records")
    one.add_argument("--sample", type=_positive, default=32, help="records to recompute")
    _device_options(one)

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
    _settings_options(one)
    _device_options(one, mesh_too=False)

    one = verb("eval", "Bits per byte on text, scores on tasks, or what replies are worth.")
    one.add_argument("checkpoint", help="folder of a run")
    one.add_argument("--data", help="folder of a token set: its validation split")
    _source_options(one, required=False)
    one.add_argument("--seq-len", type=_at_least(2), help="tokens a sequence; the run's by default")
    one.add_argument("--batch-size", type=_positive, default=8, help="sequences a batch")
    add_eval(one, _positive)
    _device_options(one)

    _model_verbs(verb)

    one = verb("inspect", "Layers, shapes, parameters, FLOPs and cache of a model.")
    one.add_argument("what", help="an experiment file, the name of a preset, or a run's folder")
    one.add_argument("--seq-len", type=_at_least(2), help="tokens a sequence for the FLOPs")
    _settings_options(one)

    _bench_options(verb("bench", "Tokens a second, memory, compile time; beside other libraries."))
    _plan_options(verb("plan", "Memory and least time of a step on hardware that is not here."))


def _bench_options(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "what",
        choices=("train", "distill", "teacher", "decode", "data"),
        help="training on tokens or on shards, a teacher that writes shards, generation, or the "
        "loader alone",
    )
    one.add_argument("--preset", default="gemma3_270m", help="the model; see `inspect`")
    _set_option(one, "change a setting of the model: attn_softcap=50")
    one.add_argument("--pattern", help="attn_pattern of the model, such as LG")
    one.add_argument("--window", type=_positive, help="sliding_window of the model")
    one.add_argument("--remat", choices=("none", "dots", "full"), help="what backward recomputes")
    one.add_argument("--compute-dtype", choices=("float32", "bfloat16"), help="of the model")
    size = one.add_mutually_exclusive_group()
    size.add_argument("--batch", type=_positive, help="sequences; decode does 1 and 64 by default")
    size.add_argument("--batch-tokens", type=_positive, help="instead: 16384 where nothing is said")
    one.add_argument("--seq-len", type=_at_least(2), help="tokens a sequence, or a prompt")
    one.add_argument("--documents", type=_positive, default=1, help="packed into each sequence")
    one.add_argument("--microbatches", type=_positive, default=1, help="as train.microbatches")
    one.add_argument("--steps", type=_positive, help="a repeat; with decode tokens a row")
    one.add_argument("--repeats", type=_positive, default=3, help="of which the median is told")
    one.add_argument("--mesh", metavar="AXIS=N,...", help="as mesh of an experiment: fsdp=4,data=2")
    one.add_argument("--rules", help="as mesh.rules of an experiment")
    one.add_argument("--data", help="folder of a token set, instead of drawn tokens")
    one.add_argument("--shards", help="folder of teacher shards, instead of drawn targets")
    one.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="PEER",
        help="also run hf, hf-compile or tunix (see benchmarks/); may be given several times",
    )
    one.add_argument("--peer-python", help="interpreter that has the peer; this one by default")
    one.add_argument(
        "--sweep",
        metavar="NAME=N,...",
        help="a point for each value of an option: seq_len=512,1024",
    )
    one.add_argument(
        "--plot", metavar="FILE", help="PNG of a sweep; bench-WHAT-NAME.png by default"
    )


def _plan_options(one: argparse.ArgumentParser) -> None:
    one.add_argument("file", help="experiment file")
    one.add_argument("--point", help="a point of its SWEEP, instead of BASE")
    _settings_options(one)
    one.add_argument("--topology", metavar="TPU:SHAPE", help="a slice to compile for: v5e:4x4")
    one.add_argument("--slices", type=_positive, default=1, help="such slices, joined by a network")
    one.add_argument(
        "--device", metavar="NAME:COUNT", help="instead, by arithmetic alone: h100:8, v5e:16"
    )
    one.add_argument(
        "--step",
        choices=("train", "teacher", "decode"),
        default="train",
        help="training, writing teacher shards, or generating a token",
    )
    one.add_argument("--rows", type=_positive, default=1, help="sequences of a decoding step")
    one.add_argument(
        "--search", action="store_true", help="rank rule presets, meshes, remat and microbatches"
    )
    one.add_argument(
        "--count", type=_positive, default=4, help="variants that a search compiles and shows"
    )


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
    one.add_argument("--max-new-tokens", type=_positive, default=64, help="at most")
    one.add_argument("--temperature", type=float, default=1.0, help="0 is greedy")
    one.add_argument("--top-k", type=_positive, help="draw from the likeliest K tokens alone")
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
    _device_options(one)

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


def _device_options(parser: argparse.ArgumentParser, *, mesh_too: bool = True) -> None:
    """Over which devices, and together with which other processes, a verb works."""
    if mesh_too:
        parser.add_argument(
            "--mesh",
            type=mesh,
            metavar="AXIS=SIZE,...",
            help="split the model over devices: fsdp=4,tensor=2; what is left over goes to data",
        )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="one of several processes, as SLURM or Cloud TPU starts them",
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    parser.add_argument("--num-processes", type=_positive, help="that run this command together")
    parser.add_argument("--process-id", type=_at_least(0), help="of this one, from 0")


def _set_option(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help=f"{help}; may be given several times",
    )


def _settings_options(parser: argparse.ArgumentParser) -> None:
    _set_option(
        parser,
        "change a setting: model.attn_pattern=LG, or 'objective=Distill(shards=\"sh/t1\")'",
    )
    parser.add_argument(
        "--arg",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a value that the file asks for; may be given several times",
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
    parser.add_argument("--vocab-size", type=_positive, default=8192, help="ids in all")
