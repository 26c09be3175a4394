"""What an experiment is: a page of settings, checked when it is made.

A description and nothing else. `experiment.py` builds the data, the teacher and the shards that it
names, and runs it.
"""

import dataclasses
from pathlib import Path

from gemma_jax import runs, tuned
from gemma_jax.data.conversations import Conversations
from gemma_jax.data.mixture import Mixture, Stage
from gemma_jax.data.tokenizer import TokenizerConfig
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.distill.teacher import TeacherJob
from gemma_jax.errors import UserError, require_positive
from gemma_jax.model.config import ModelConfig
from gemma_jax.settings import check_types
from gemma_jax.sharding import MeshConfig
from gemma_jax.training.bad_steps import Skip, Stop
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.objective import Xent
from gemma_jax.training.optim import AdamW, Cosine, Muon, WarmupStableDecay
from gemma_jax.tuning.lora import Lora, QLora
from gemma_jax.tuning.qat import Qat
from gemma_jax.tuning.sft import Sft


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment:
    """One training run. Its folder is `runs/NAME`.

    `tokens` and `batch_tokens` count label positions; steps follow from them. `data` is a corpus
    (built where it is not yet), the folder of a built one, or a mixture. A distillation run
    trains on its shards and is validated on `data`.

    Weights begin at random, or with those of `init`: a run's folder, one of its checkpoints or an
    imported model, whose settings `model` then defaults to. Tuning (`Sft`) reads `Conversations`,
    and may count `epochs` over them in place of tokens. With an `adapter` the weights of `init`
    stay as they are, and the run holds the adapter alone.
    """

    name: str
    model: ModelConfig = None  # type: ignore[assignment] # that of `init`
    init: str | None = None
    data: Corpus | Mixture | Conversations | str
    objective: Xent | Distill | Sft = Xent()
    adapter: Lora | QLora | None = None
    quantization: Qat | None = None
    optimizer: AdamW | Muon = AdamW()
    tokens: int | None = None
    epochs: int | None = None
    batch_tokens: int
    seq_len: int
    seed: int = 0
    valid_tokens: int = 500_000  # at most this many, the same ones each time
    train: LoopConfig = LoopConfig()
    mesh: MeshConfig = MeshConfig()

    def __post_init__(self) -> None:
        if self.model is None and isinstance(self.init, str):
            object.__setattr__(self, "model", tuned.config_of(self.init))
        check_types(self)
        require_positive(self, "tokens", "epochs", "batch_tokens", "seq_len", "valid_tokens")
        self._check_length()
        if self.adapter is not None and self.init is None:
            raise UserError("an adapter needs the weights that it is trained on; give init=RUN.")
        if self.adapter is not None and self.quantization is not None:
            raise UserError(
                "adapter and quantization do not go together; export the adapter merged, import "
                "that, and train it with quantization."
            )
        parts = Path(self.name).parts
        if not parts or Path(self.name).is_absolute() or ".." in parts:
            raise UserError(f"name='{self.name}' must name a folder inside {runs.RUNS}.")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed={self.seed} is outside 0..{2**32 - 1}; choose another.")
        if self.seq_len > self.model.max_seq_len:
            raise UserError(
                f"seq_len={self.seq_len} is over the model's context of "
                f"model.max_seq_len={self.model.max_seq_len} tokens; shorten the one or extend the "
                "other."
            )
        if self.batch_tokens % (self.seq_len * self.train.microbatches):
            raise UserError(
                f"batch_tokens={self.batch_tokens} must be a multiple of seq_len={self.seq_len} "
                f"times train.microbatches={self.train.microbatches}."
            )

    def _check_length(self) -> None:
        if isinstance(self.data, Conversations) != isinstance(self.objective, Sft):
            raise UserError(
                "objective=Sft(...) and data=Conversations(...) need each other; give both or "
                "neither."
            )
        if (self.tokens is None) == (self.epochs is None):
            raise UserError("give tokens, or with conversations epochs, and not both.")
        if self.epochs is not None and not isinstance(self.data, Conversations):
            raise UserError(
                f"epochs={self.epochs} is for data=Conversations(...); give tokens instead."
            )
        if self.tokens is not None and self.tokens < self.batch_tokens:
            raise UserError(
                f"tokens={self.tokens} is less than one batch of batch_tokens={self.batch_tokens}."
            )

    @property
    def folder(self) -> Path:
        return runs.RUNS / self.name

    @property
    def num_steps(self) -> int | None:
        """None where `epochs` decide: then the data must be read first."""
        return None if self.tokens is None else self.tokens // self.batch_tokens

    @property
    def batch_size(self) -> int:
        """Sequences a batch."""
        return self.batch_tokens // self.seq_len


@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherRun(TeacherJob):
    """Teacher shards with where they come from.

    `teacher` is an experiment (trained first) or the folder of a trained run. The teacher reads
    the training split of `data` once, packed into `seq_len` tokens; both default to its own.
    """

    teacher: Experiment | str
    data: Corpus | str | None = None
    seq_len: int | None = None
    num_sequences: int | None = None  # None: all


# What a setting can be made of on the command line: `--set "optimizer=Muon(learning_rate=1e-3)"`.
SETTINGS = {
    cls.__name__: cls
    for cls in (
        *(AdamW, Conversations, Corpus, Cosine, Distill, Experiment, LoopConfig, Lora, MeshConfig),
        *(Mixture, ModelConfig, Muon, Qat, QLora, Sft, Stage, TeacherRun, TokenizerConfig),
        *(Skip, Stop, WarmupStableDecay, Xent),
    )
}
