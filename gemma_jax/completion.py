"""Text in, text out: completions of prompts and conversations with the model of a run folder."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import jax

from gemma_jax import adapted, runs
from gemma_jax.data.chat import check_unicode, encode_chat
from gemma_jax.data.tokenizer import BOS, END_OF_TURN, Tokenizer
from gemma_jax.errors import PromptError, UserError
from gemma_jax.generation.constrain import BoundCompletion, OnLimit, write_bound_texts
from gemma_jax.generation.decode import Generator
from gemma_jax.generation.grammar import Grammar, GrammarTokenizer
from gemma_jax.generation.programs import State
from gemma_jax.generation.sampling import Sampling
from gemma_jax.generation.text import STOP_IDS, STRIDE, TextCompletion, Writer, write_texts
from gemma_jax.model.transformer import Transformer
from gemma_jax.settings import override
from gemma_jax.sharding import MeshConfig, chosen_layout
from gemma_jax.training.weights import weights_hash
from gemma_jax.tuning.lora import join_many

type Prompt = str | Sequence[Mapping[str, str]]  # a text, or the messages of a conversation


class TextGenerator:
    """A model and its tokenizer, ready to write."""

    def __init__(
        self,
        folder: str | Path,
        *,
        compute_dtype: str | None = None,
        adapters: Mapping[str, str | Path] | None = None,
        mesh: MeshConfig | None = None,
    ) -> None:
        """`folder` is a run, one of its checkpoints, or an imported model.

        The compute dtype is the model's own; on a CPU, which has no fast bfloat16, float32.
        `adapters` are runs that hold adapters on this model, by a name for each; a prompt may ask
        for one of them, and those of one batch for different ones. `mesh` splits the model over
        devices; it is on the first one by default.
        """
        layout = chosen_layout(mesh)
        on_cpu = jax.default_backend() == "cpu"
        compute_dtype = compute_dtype or ("float32" if on_cpu else None)
        if adapters:
            if layout is not None:
                raise UserError(
                    "several adapters on one base run on one device; leave the mesh out, or give "
                    "the run of one adapter as the model."
                )
            loaded = load_adapters(folder, list(adapters.values()), compute_dtype)
        else:
            loaded = runs.load_model(folder, layout=layout, compute_dtype=compute_dtype)
        self._pieces: GrammarTokenizer | None = None
        self._adapters = {name: number for number, name in enumerate(adapters or {}, 1)}
        self.tokenizer = loaded.tokenizer
        self.generator = Generator(loaded.model, loaded.params, layout)

    @property
    def context(self) -> int:
        return self.generator.model.config.max_seq_len

    def complete(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (),
        adapters: Sequence[str | None] | None = None,
    ) -> list[TextCompletion]:
        """The continuation of each prompt; messages are continued by a turn of the model.

        A prompt's result depends on itself and its seed (0, 1, ... by default) alone. `stop` are
        texts that end a completion. `adapters` names one a prompt, None being the model as it is;
        by default all use the only one, where there is one.
        """
        return write_texts(
            self.generator,
            self.tokenizer,
            self._encode(prompts),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=seeds,
            stop=stop,
            adapters=self.numbers(adapters, len(prompts)),
        )

    def complete_bound(
        self,
        prompts: Sequence[Prompt],
        grammars: Sequence[Grammar],
        *,
        max_new_tokens: int = 256,
        sampling: Sampling | None = None,
        seeds: Sequence[int] | None = None,
        on_limit: OnLimit = "close",
        adapters: Sequence[str | None] | None = None,
    ) -> list[BoundCompletion]:
        """Like `complete`, each text belonging to the grammar of its prompt (`generation.grammar`).

        A text that `max_new_tokens` would cut off is closed in time, or left as it is ("cut").
        """
        if self._pieces is None:
            size = self.generator.model.config.vocab_size
            self._pieces = GrammarTokenizer(self.tokenizer, size)
        return write_bound_texts(
            self.generator,
            self.tokenizer,
            self._pieces,
            self._encode(prompts),
            grammars,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=seeds,
            on_limit=on_limit,
            adapters=self.numbers(adapters, len(prompts)),
        )

    def numbers(self, names: Sequence[str | None] | None, count: int) -> list[int] | None:
        """What the generator calls the adapters of `count` prompts; None where it holds none."""
        known = self._adapters
        if names is None:
            if len(known) > 1:
                raise UserError(
                    f"there are {len(known)} adapters; say for each prompt which it uses: "
                    f"{', '.join(known)}."
                )
            names = [next(iter(known), None)] * count
        if len(names) != count:
            raise UserError(f"{len(names)} adapters for {count} prompts; give one a prompt.")
        for number, name in enumerate(names):
            if name is not None and name not in known:
                there = f"there are: {', '.join(known)}" if known else "none was given"
                raise PromptError(number, f"there is no adapter '{name}'; {there}.")
        return [0 if name is None else known[name] for name in names] if known else None

    def stream(
        self,
        prompt: Prompt,
        *,
        max_new_tokens: int = 64,
        sampling: Sampling | None = None,
        seed: int = 0,
        stop: Sequence[str] = (),
        adapter: str | None = None,
    ) -> Iterator[str]:
        """The continuation of one prompt, in pieces as it is written."""
        writer = Writer(self.tokenizer, stop)
        for tokens, logprobs in self.generator.stream(
            self._encode([prompt]),
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            seeds=[seed],
            stop_ids=STOP_IDS,
            stride=STRIDE,
            adapters=self.numbers(None if adapter is None else [adapter], 1),
        ):
            yield writer.add(tokens[0], logprobs[0])
            if writer.stopped:
                break
        yield writer.rest()

    def _encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        found = []
        for number, prompt in enumerate(prompts):
            try:
                if isinstance(prompt, str):
                    check_unicode(prompt, "the prompt")
                    found.append([BOS, *self.tokenizer.encode(prompt)])
                else:
                    found.append(encode_chat(self.tokenizer, prompt, add_generation_prompt=True))
            except UserError as error:
                raise PromptError(number, str(error)) from None
        return found


def load_adapters(
    folder: str | Path, adapters: Sequence[str | Path], compute_dtype: str | None = None
) -> runs.LoadedModel:
    """One model with several adapters, of which each row of a batch asks for one by its number;
    1 is the first, 0 the model alone (`tuning.lora.join_many`).

    The base is held once, on the first device: in NF4 where the adapters were trained so.
    """
    run, _ = runs.run_and_step(folder)
    config = runs.read_config(run / runs.MODEL)
    if compute_dtype is not None:
        config = override(config, {"compute_dtype": compute_dtype})
    model, weights, own = Transformer(config), runs.open_base(folder), []
    known = weights_hash(model.shapes(), weights.read)
    for place in adapters:
        path, step = runs.run_and_step(place)
        if not adapted.is_adapter(path):
            raise UserError(f"{path} holds a whole model and no adapter; give it as the model.")
        described = adapted.read_adapter(path)
        if described.base_hash != known:
            raise UserError(
                f"the adapter {path} was trained on {described.base}, and {folder} has other "
                "weights; give that base."
            )
        own.append(
            (described.settings, adapted.load_adapter(path, step, described.settings, model))
        )
    settings = own[0][0]
    if any(adapted.held_alike(settings) != adapted.held_alike(other) for other, _ in own):
        raise UserError(
            "some of the adapters were trained on a base in NF4 and some were not, so they do not "
            "share one; give those of one kind."
        )
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    base = adapted.load_frozen(
        weights, settings, model, lambda value, _: jax.device_put(value, device)
    )
    params = join_many(own, base)
    return runs.LoadedModel(model, params, Tokenizer.load(run / runs.TOKENIZER))


class Conversation:
    """Turns with one model. What was said stays in the cache: a turn reads its own text alone."""

    def __init__(
        self,
        writer: TextGenerator,
        *,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        seed: int = 0,
        adapter: str | None = None,
    ) -> None:
        self._adapters = writer.numbers(None if adapter is None else [adapter], 1)
        self._writer, self._sampling = writer, sampling or Sampling()
        self._limit, self._seed = max_new_tokens, seed
        self._ids: list[int] = []  # all that was fed
        self._state: State | None = None
        self._capacity = 0

    def say(self, text: str) -> Iterator[str]:
        """The model's answer, in pieces as it is written."""
        tokenizer = self._writer.tokenizer
        message = [{"role": "user", "content": text}]
        turn = encode_chat(tokenizer, message, add_generation_prompt=True)
        if self._ids:
            ending = [] if self._ids[-1] == END_OF_TURN else [END_OF_TURN]
            turn = [*ending, *tokenizer.encode("\n"), *turn[1:]]  # without BOS
        self._feed(turn)
        writer = Writer(tokenizer, ())
        for left in range(self._limit, 0, -STRIDE):
            assert self._state is not None
            self._state, tokens, logprobs = self._writer.generator.advance(
                self._state, min(STRIDE, left), sampling=self._sampling, stop_ids=STOP_IDS
            )
            self._ids += [token for token in tokens[0].tolist() if token >= 0]
            yield writer.add(tokens[0], logprobs[0])
            if writer.stopped:
                break
        yield writer.rest()

    def _feed(self, turn: list[int]) -> None:
        needed = len(self._ids) + len(turn) + self._limit
        if needed > self._writer.context:
            raise UserError(
                f"the conversation of {len(self._ids)} tokens, {len(turn)} more and an answer of "
                f"up to {self._limit} leave the context of {self._writer.context}; begin anew "
                "or allow fewer new tokens."
            )
        generator = self._writer.generator
        if self._state is None or needed > self._capacity:
            # Room for as much again, so that a long conversation is seldom read anew.
            self._capacity = min(2 * needed, self._writer.context)
            self._state = generator.begin(
                [[*self._ids, *turn]],
                capacity=self._capacity,
                seeds=[self._seed],
                sampling=self._sampling,
                adapters=self._adapters,
            )
        else:
            going = self._state._replace(done=self._state.done & False)
            self._state = generator.extend(going, [turn])
        self._ids += turn


def complete(
    folder: str | Path,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | None = None,
    stop: Sequence[str] = (),
) -> list[str]:
    """The continuation of each prompt by the model of a run folder, without the prompt."""
    results = TextGenerator(folder).complete(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seeds=seeds, stop=stop
    )
    return [result.text for result in results]
