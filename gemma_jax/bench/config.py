"""What is measured: one frozen description for all kinds of measurement."""

import dataclasses
from typing import Literal, get_args

from gemma_jax.errors import UserError, require_positive
from gemma_jax.model.config import ModelConfig
from gemma_jax.settings import check_types
from gemma_jax.sharding import MeshConfig

What = Literal["train", "distill", "teacher", "decode", "data"]
WHATS: tuple[What, ...] = get_args(What)
TOKENS = 8 * 2048  # of a batch, where nothing says otherwise


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """One measurement.

    `seq_len` is the length of a sequence, of a prompt with `decode`. `steps` are steps a repeat:
    batches, or new tokens a row with `decode`. `documents` are packed into each sequence, on
    average. `data` is a token set and `shards` teacher shards; drawn ones take their place.
    """

    what: What
    model: ModelConfig
    batch: int
    seq_len: int
    steps: int
    repeats: int = 3
    warmup: int = 2  # steps before the first repeat
    documents: int = 1
    microbatches: int = 1
    mesh: MeshConfig = MeshConfig()
    data: str | None = None
    shards: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_types(self)
        require_positive(self, "batch", "seq_len", "steps", "repeats", "warmup", "documents")
        require_positive(self, "microbatches")
        context, new = self.model.max_seq_len, self.steps if self.what == "decode" else 0
        if not 2 <= self.seq_len <= context - new:
            tail = f" less {new} new tokens" if new else ""
            raise UserError(
                f"--seq-len {self.seq_len} must lie between 2 and the model's context, {context}"
                f"{tail}; change it or --set max_seq_len."
            )
        if self.documents > self.seq_len // 2:
            raise UserError(
                f"--documents {self.documents} do not fit into {self.seq_len} tokens; ask for "
                f"{self.seq_len // 2} at most."
            )
        if self.batch % self.microbatches:
            raise UserError(
                f"--batch {self.batch} does not divide by --microbatches {self.microbatches}; "
                "change one of them."
            )
        self._refuse_unused()

    def _refuse_unused(self) -> None:
        """Refuses options that would change nothing, so that no figure bears a wrong name."""
        reads_tokens = self.what in ("train", "teacher", "data")
        reads_shards = self.what in ("distill", "data")
        learns = self.what in ("train", "distill")
        unused = {
            "--data": self.data is not None and not reads_tokens,
            "--shards": self.shards is not None and not reads_shards,
            "--documents": self.documents > 1 and self.what == "decode",
            "--microbatches": self.microbatches > 1 and not learns,
            "--mesh and --rules": self.mesh != MeshConfig() and self.what in ("decode", "data"),
        }
        for option in (name for name, given in unused.items() if given):
            raise UserError(f"bench {self.what} has no use for {option}; leave it out.")
        if self.data is not None and self.shards is not None:
            raise UserError("give either tokens (--data) or shards (--shards), not both.")
        if self.documents > 1 and (self.data or self.shards):
            raise UserError(
                "--documents is for drawn tokens, and those on disk have their own; leave it out."
            )


def default_sizes(what: What, model: ModelConfig) -> dict[str, int]:
    """seq_len and steps of a measurement, within the model's context."""
    if what == "decode":
        prompt = min(1024, model.max_seq_len // 2)
        return {"seq_len": prompt, "steps": min(256, model.max_seq_len - prompt)}
    steps = {"train": 10, "distill": 10, "teacher": 64, "data": 50}[what]
    return {"seq_len": min(2048, model.max_seq_len), "steps": steps}
