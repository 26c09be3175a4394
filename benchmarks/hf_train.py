"""Training steps of Hugging Face transformers: AdamW (fused), weights in the compute dtype.

python hf_train.py --batch 8 --seq-len 2048 --compile
"""

from typing import Any

import common
import hf_model
import torch


def main() -> None:
    parser = common.parser(__doc__, batch=8, seq_len=2048, steps=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="through torch.compile")
    options = parser.parse_args()
    if options.batch % options.microbatches:
        parser.error("--batch must divide by --microbatches")
    model = hf_model.build(options.model, options.dtype).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    forward: Any = torch.compile(model) if options.compile else model
    count = 1 + options.warmup + options.steps
    drawn = torch.from_numpy(common.batches(options, count)).to(hf_model.DEVICE)
    losses = []

    def run(steps: int) -> None:
        for i in range(steps):
            for part in drawn[i].chunk(options.microbatches):
                loss = forward(input_ids=part, labels=part, use_cache=False).loss
                (loss / options.microbatches).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        hf_model.wait()
        losses.append(loss.item())

    first = common.timed(lambda: run(1))
    run(options.warmup)
    times = common.repeated(lambda: run(options.steps), options.repeats)
    row = common.row(
        options,
        "train",
        times,
        options.steps * options.batch * options.seq_len,
        options.steps,
        loss=losses[-1],
        peak_bytes=hf_model.peak_bytes(),
        compile_s=first,
    )
    name = "hf-compile" if options.compile else "hf"
    common.emit(name, hf_model.device_name(), ("torch", "transformers"), [row])


if __name__ == "__main__":
    main()
