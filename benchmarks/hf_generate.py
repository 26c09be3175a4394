"""Greedy generation with Hugging Face transformers, weights in the compute dtype.

    python hf_generate.py --batch 1 --seq-len 1024 --steps 256 --static

`--static` is a static cache, whose step transformers compiles by itself on a GPU. The prompt is
read when the scores of the first new token are there; what follows is decoding.
"""

import time
from typing import Any

import common
import hf_model
import torch
from transformers import LogitsProcessor, LogitsProcessorList


class FirstScores(LogitsProcessor):
    """Notes when the scores of the first new token are there, and changes nothing."""

    def __init__(self) -> None:
        self.at: float | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.at is None:
            hf_model.wait()
            self.at = time.perf_counter()
        return scores


def main() -> None:
    parser = common.parser(__doc__, batch=1, seq_len=1024, steps=256)
    parser.add_argument("--static", action="store_true", help="static cache, compiled")
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be 2 or more: the first comes with the prompt")
    model = hf_model.build(options.model, options.dtype).eval()
    prompts = torch.from_numpy(common.batches(options, 1)[0]).to(hf_model.DEVICE)
    cache = {"cache_implementation": "static"} if options.static else {}

    def generate() -> tuple[float, float]:
        """Seconds of reading and of decoding."""
        clock = FirstScores()
        began = time.perf_counter()
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=options.steps,
                max_new_tokens=options.steps,
                logits_processor=LogitsProcessorList([clock]),
                **cache,
            )
        hf_model.wait()
        assert clock.at is not None
        return clock.at - began, time.perf_counter() - clock.at

    first_read, first = generate()
    generate()  # a compiled step may settle at its second use
    reading, decoding = zip(*(generate() for _ in range(options.repeats)), strict=True)
    drawn = options.steps - 1
    peak = hf_model.peak_bytes()
    rows = [
        common.row(
            options,
            "prefill",
            list(reading),
            options.batch * options.seq_len,
            1,
            peak_bytes=peak,
            compile_s=first_read,
        ),
        common.row(
            options,
            "decode",
            list(decoding),
            options.batch * drawn,
            drawn,
            peak_bytes=peak,
            compile_s=first,
        ),
    ]
    name = "hf-compile" if options.static else "hf"
    common.emit(name, hf_model.device_name(), ("torch", "transformers"), rows)


if __name__ == "__main__":
    main()
