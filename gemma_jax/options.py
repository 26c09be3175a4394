"""Types of the command line's options, and options that several verbs take."""

import argparse
from collections.abc import Callable
from typing import Any


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


def at_least(least: int) -> Callable[[str], int]:
    """The type of an option that is a whole number from `least` on."""

    def whole_number(text: str) -> int:
        if (value := int(text)) < least:
            raise argparse.ArgumentTypeError(
                f"{value} is below {least}, the smallest that it takes"
            )
        return value

    whole_number.__name__ = "whole number"  # what argparse calls it in its messages
    return whole_number


positive = at_least(1)


def device_options(parser: argparse.ArgumentParser, *, mesh_too: bool = True) -> None:
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
    parser.add_argument("--num-processes", type=positive, help="that run this command together")
    parser.add_argument("--process-id", type=at_least(0), help="of this one, from 0")


def set_option(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PATH=VALUE",
        help=f"{help}; may be given several times",
    )


def settings_options(parser: argparse.ArgumentParser) -> None:
    set_option(
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


def source_options(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "--source",
        action="append",
        required=required,
        help="file, glob, folder, hf:NAME, hf:NAME:SPLIT, hf:NAME:CONFIG:SPLIT or stdlib; may be "
        "given several times",
    )
    parser.add_argument("--text-field", default="text", help="field of JSON lines and Parquet")


def tokenizer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vocab-size", type=positive, default=8192, help="ids in all")
