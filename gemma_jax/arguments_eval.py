"""The options of `eval` beside those that say which text: tasks, and replies to conversations."""

import argparse

from gemma_jax.options import positive


def add_eval(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--quantization",
        choices=("q4_0", "int4", "sfp8"),
        help="round the weights first, as a file of that type holds them",
    )
    one.add_argument(
        "--compute-dtype", choices=("float32", "bfloat16"), help="instead of the model's own"
    )
    both = one.add_argument_group("tasks and conversations")
    both.add_argument("--limit", type=positive, help="examples of each at most")
    both.add_argument("--batch-tokens", type=positive, default=8192, help="tokens at once")
    both.add_argument("--output", metavar="FILE", help="write the scores there as JSON")
    one.add_argument(
        "--tasks",
        metavar="NAME,...",
        help="standard sets such as hellaswag or arc_easy:5shot, and files of JSON lines",
    )
    replies = one.add_argument_group("conversations")
    replies.add_argument(
        "--conversations",
        metavar="FILE",
        help="JSON lines: the model speaks the last turn of each, greedily",
    )
    replies.add_argument("--schema", metavar="FILE", help="bind replies to this JSON schema")
    replies.add_argument(
        "--free", action="store_true", help="judge replies by the schema, and do not bind them"
    )
    replies.add_argument(
        "--scorer",
        metavar="FILE.py:FUNCTION",
        help="f(line, reply): a number, or a dict of numbers or of pairs (total, weight)",
    )
    replies.add_argument(
        "--few-shot", metavar="FILE:K", help="put the first K conversations of FILE before each"
    )
    replies.add_argument(
        "--prompt-format",
        choices=("chat", "text"),
        default="chat",
        help="turns, or plain text for a model that was never tuned",
    )
    replies.add_argument("--max-new-tokens", type=positive, default=256, help="of a reply, at most")
    replies.add_argument(
        "--replies", metavar="FILE", help="write what was asked, wanted and said, a line each"
    )
