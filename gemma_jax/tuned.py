"""What a tuning run is made of: the weights it begins with, and conversations as its data."""

import functools
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jax.sharding import NamedSharding

from gemma_jax import adapted, runs
from gemma_jax.adapted import Adapter, write_adapter
from gemma_jax.data.conversations import Conversations, ConversationSet, read_conversations
from gemma_jax.data.loader import conversation_stream
from gemma_jax.data.packed_conversations import PackedConversations
from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.eval.perplexity import make_evaluation
from gemma_jax.eval.replies import make_reply_evaluation
from gemma_jax.files import read_json, write_json
from gemma_jax.hosts import is_first
from gemma_jax.model.config import ModelConfig
from gemma_jax.model.transformer import Transformer
from gemma_jax.sharding import Layout
from gemma_jax.training.weights import weights_hash
from gemma_jax.tuning.lora import Lora, adapter_axes, init_adapter, join
from gemma_jax.tuning.sft import Sft


class Lessons(NamedTuple):
    """The conversations of a run, ready to be trained on."""

    conversations: ConversationSet
    packed: PackedConversations
    num_steps: int
    limit: int | None  # sequences in all; None where the steps are given

    def batches(self, batch_size: int, rows: Sequence[int]) -> grain.IterDataset:
        """Batches, of which this process reads `rows`."""
        return conversation_stream(
            self.packed,
            batch_size=batch_size,
            num_batches=self.num_steps,
            limit=self.limit,
            rows=rows,
        )

    def most_documents(self, batch_size: int) -> int:
        """That are in any sequence of the run."""
        return self.packed.most_documents(self.limit or self.num_steps * batch_size)


def tokenizer_of(data: Conversations, init: str | None) -> Tokenizer:
    """The tokenizer of conversations: their own, or that of the weights to begin with."""
    if data.tokenizer is not None:
        return Tokenizer.load(data.tokenizer)
    if init is None:
        raise UserError("conversations need a tokenizer; give init=RUN, or data.tokenizer=FILE.")
    return Tokenizer.load(runs.run_and_step(init)[0] / runs.TOKENIZER)


def read_lessons(
    data: Conversations,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    batch_size: int,
    num_steps: int | None,
    epochs: int | None,
    seed: int,
) -> Lessons:
    """Reads and packs. The steps are given, or as many as `epochs` take, the last batch padded."""
    conversations = read_conversations(data, tokenizer, seq_len)
    packed = PackedConversations(conversations.train, seq_len, seed)
    if num_steps is not None:
        return Lessons(conversations, packed, num_steps, None)
    limit = packed.count(epochs or 1)
    return Lessons(conversations, packed, -(-limit // batch_size), limit)


def check_unchanged(folder: Path, conversations: ConversationSet) -> None:
    """Refuses to go on with a run on conversations other than those it began with."""
    now, path = conversations.fingerprint(), folder / runs.CONVERSATIONS
    if path.exists() and read_json(path, "the conversations of a run") != now:
        raise UserError(
            f"the conversations are not those that {folder} was begun with ({path}); give back the "
            "files of then, or give the experiment another name."
        )
    if is_first():
        write_json(path, now)


def make_lesson_evaluation(
    model: Transformer,
    tokenizer: Tokenizer,
    lessons: Lessons,
    objective: Sft,
    layout: Layout,
    *,
    batch_size: int,
    valid_tokens: int,
) -> Callable[[Any], dict[str, float]]:
    """Loss and bits per byte of the model's held-out turns, and what its replies are worth."""
    valid = lessons.conversations.valid
    measure = make_evaluation(
        model,
        _once(valid, lessons.packed.seq_len, valid_tokens),
        tokenizer.token_bytes(),
        layout,
        batch_size=batch_size,
    )
    if not objective.replies:
        return measure
    if jax.process_count() > 1:
        raise UserError(
            f"objective.replies={objective.replies} of a run on {jax.process_count()} processes "
            "cannot be generated; set objective.replies=0."
        )
    answer = make_reply_evaluation(
        model,
        tokenizer,
        valid[: objective.replies],
        max_new_tokens=objective.max_new_tokens,
        scorer=objective.scorer,
    )
    return lambda params: answer(params) | measure(params)


def _once(valid: list, seq_len: int, valid_tokens: int) -> Iterator[dict[str, np.ndarray]]:
    packed = PackedConversations(valid, seq_len, seed=0)
    return islice(packed.once(), max(1, valid_tokens // seq_len))


def config_of(init: str) -> ModelConfig:
    """The settings of the model to begin with."""
    return runs.read_config(runs.run_and_step(init)[0] / runs.MODEL)


def check_init(init: str, config: ModelConfig, tokenizer: Tokenizer) -> None:
    """Refuses weights that do not fit the model, or another tokenizer than theirs."""
    folder, _ = runs.run_and_step(init)
    theirs = {_name(p): x.shape for p, x in _leaves(runs.read_config(folder / runs.MODEL))}
    ours = {_name(p): x.shape for p, x in _leaves(config)}
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise UserError(
                f"init={init!r} does not fit model: parameter {name} has shape "
                f"{theirs.get(name, 'none')} there and {ours.get(name, 'none')} here; leave model "
                "out to take its settings."
            )
    if Tokenizer.load(folder / runs.TOKENIZER).hash != tokenizer.hash:
        raise UserError(
            f"init={init!r} has another tokenizer than the data; build the data with "
            f"{folder / runs.TOKENIZER}."
        )


def load_params(init: str, config: ModelConfig, shardings: Any) -> Any:
    """The parameters of `init` in float32, laid out by `shardings`."""
    like = jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        Transformer(config).shapes(),
        shardings,
    )
    return runs.load_weights(init, config, like)


def adapted_job(
    settings: Lora, init: str, model: Transformer, layout: Layout, folder: Path, seed: int
) -> dict[str, Any]:
    """The parts of a `Job` that trains an adapter on the frozen weights of `init`."""
    shapes = model.shapes()

    def place(value: np.ndarray, names: tuple | None) -> jax.Array:
        return runs.put(value, _place_of(value, names, layout))

    def load_frozen() -> Any:
        base = runs.open_base(init)
        if is_first():
            write_adapter(folder, Adapter(settings, init, weights_hash(shapes, base.read)))
        return adapted.load_frozen(base, settings, model, place)

    return {**adapter_parts(settings, model, seed), "load_frozen": load_frozen}


def adapter_parts(settings: Lora, model: Transformer, seed: int) -> dict[str, Any]:
    """The parts of a `Job` that trains an adapter, without the weights that it stands on."""
    axes, shapes = model.axes(), model.shapes()
    return {
        "init_params": lambda: init_adapter(settings, axes, shapes, jax.random.key(seed)),
        "axes": adapter_axes(settings, axes),
        "load_params": None,
        "join": functools.partial(join, settings),
    }


def frozen_like(settings: Lora, model: Transformer, layout: Layout) -> Any:
    """The base of an adapter as `adapted_job` would hold it, in shapes: made of zeros, a parameter
    at a time."""

    class Zeros:
        def read(self, path: Any, layer: Any, start: int, stop: int) -> np.ndarray:
            return np.zeros(shapes[path], np.float32)

    shapes = {
        tuple(k.key for k in p): x.shape for p, x in jax.tree.leaves_with_path(model.shapes())
    }

    def place(value: np.ndarray, names: tuple | None) -> Any:
        where = _place_of(value, names, layout)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=where)

    return adapted.load_frozen(Zeros(), settings, model, place)


def _place_of(value: np.ndarray, names: tuple | None, layout: Layout) -> NamedSharding:
    if names is None:
        return layout.replicated()
    return NamedSharding(layout.mesh, layout.spec(names, value.shape))


def _leaves(config: ModelConfig) -> list[tuple[Any, Any]]:
    return jax.tree.leaves_with_path(Transformer(config).shapes())


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path)
