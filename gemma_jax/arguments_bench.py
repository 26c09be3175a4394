"""What `bench` and `plan` take."""

import argparse

from gemma_jax.options import at_least, positive, set_option, settings_options


def add_bench(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "what",
        choices=("train", "distill", "teacher", "decode", "data"),
        help="training on tokens or on shards, a teacher that writes shards, generation, or the "
        "loader alone",
    )
    one.add_argument("--preset", default="gemma3_270m", help="the model; see `inspect`")
    set_option(one, "change a setting of the model: attn_softcap=50")
    one.add_argument("--pattern", help="attn_pattern of the model, such as LG")
    one.add_argument("--window", type=positive, help="sliding_window of the model")
    one.add_argument("--remat", choices=("none", "dots", "full"), help="what backward recomputes")
    one.add_argument("--compute-dtype", choices=("float32", "bfloat16"), help="of the model")
    size = one.add_mutually_exclusive_group()
    size.add_argument("--batch", type=positive, help="sequences; decode does 1 and 64 by default")
    size.add_argument("--batch-tokens", type=positive, help="instead: 16384 where nothing is said")
    one.add_argument("--seq-len", type=at_least(2), help="tokens a sequence, or a prompt")
    one.add_argument("--documents", type=positive, default=1, help="packed into each sequence")
    one.add_argument("--microbatches", type=positive, default=1, help="as train.microbatches")
    one.add_argument("--steps", type=positive, help="a repeat; with decode tokens a row")
    one.add_argument("--repeats", type=positive, default=3, help="of which the median is told")
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


def add_plan(one: argparse.ArgumentParser) -> None:
    one.add_argument("file", help="experiment file")
    one.add_argument("--point", help="a point of its SWEEP, instead of BASE")
    settings_options(one)
    one.add_argument("--topology", metavar="TPU:SHAPE", help="a slice to compile for: v5e:4x4")
    one.add_argument("--slices", type=positive, default=1, help="such slices, joined by a network")
    one.add_argument(
        "--device", metavar="NAME:COUNT", help="instead, by arithmetic alone: h100:8, v5e:16"
    )
    one.add_argument(
        "--step",
        choices=("train", "teacher", "decode"),
        default="train",
        help="training, writing teacher shards, or generating a token",
    )
    one.add_argument("--rows", type=positive, help="sequences of a decoding step (default: 1)")
    one.add_argument(
        "--search", action="store_true", help="rank rule presets, meshes, remat and microbatches"
    )
    one.add_argument(
        "--count", type=positive, help="variants that a search compiles and shows (default: 4)"
    )
