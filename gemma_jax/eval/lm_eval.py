"""A model of ours for lm-evaluation-harness (the optional extra `lm-eval`), with all of its tasks.

from lm_eval import simple_evaluate
from gemma_jax.trained import lm_eval_model
simple_evaluate(lm_eval_model("runs/NAME"), tasks=["hellaswag"], num_fewshot=10)
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from gemma_jax.data.tokenizer import BOS, Tokenizer
from gemma_jax.errors import UserError
from gemma_jax.eval.answers import write_answers
from gemma_jax.eval.likelihood import Request, likelihoods
from gemma_jax.eval.tasks import score_pairs
from gemma_jax.generation.decode import Generator
from gemma_jax.generation.sampling import Sampling
from gemma_jax.model.transformer import Transformer
from gemma_jax.progress import progress


class GemmaLM(LM):
    """Scores and texts by `eval.tasks` and `generation`.

    `window` is the tokens at once of a long text in `loglikelihood_rolling`.
    """

    def __init__(
        self,
        model: Transformer,
        params: Any,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int = 8192,
        window: int = 2048,
    ) -> None:
        super().__init__()
        self._model, self._params, self._tokenizer = model, params, tokenizer
        self._batch_tokens = batch_tokens
        # A window and the token before it have to fit.
        self._window = min(window, model.config.max_seq_len - 1)

    def loglikelihood(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(nats, greedy) of the continuation of each (context, continuation)."""
        results: list[tuple[float, bool]] = []
        with progress("loglikelihood", len(requests), quiet=disable_tqdm) as advance:
            # Contexts of one task are apt to begin alike; what they share is read once.
            for _, group in itertools.groupby(requests, key=lambda one: one.task_name):
                pairs = [request.args for request in group]
                found = score_pairs(
                    self._model,
                    self._params,
                    self._tokenizer,
                    pairs,
                    batch_tokens=self._batch_tokens,
                    advance=advance,
                )[0]
                results += [(one.logprob, one.greedy) for one in found]
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Nats of each text, every token predicted once; BOS comes before the first."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for context, continuation in self._windows(request.args[0]):
                windows.append(Request(context, [continuation]))
                owners.append(number)
        results = [0.0] * len(requests)
        with progress("loglikelihood_rolling", len(windows), quiet=disable_tqdm) as advance:
            found = likelihoods(
                self._model,
                self._params,
                windows,
                batch_tokens=self._batch_tokens,
                advance=advance,
            )
        for owner, (score,) in zip(owners, found, strict=True):
            results[owner] += score.logprob
        return results

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        tokens = self._tokenizer.encode(text)
        for pair in get_rolling_token_windows(tokens, BOS, self._window, 1):
            yield make_disjoint_window(pair)

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context up to one of `until`."""
        results = [""] * len(requests)
        alike: dict[str, list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(number)
        generator = Generator(self._model, self._params)
        with progress("generate_until", len(requests), quiet=disable_tqdm) as advance:
            for numbers in alike.values():
                settings = dict(requests[numbers[0]].args[1])
                until = settings.get("until") or []
                texts = write_answers(
                    generator,
                    self._tokenizer,
                    [requests[number].args[0] for number in numbers],
                    stop=[until] if isinstance(until, str) else until,
                    max_new_tokens=self._max_new_tokens(settings),
                    batch_tokens=self._batch_tokens,
                    sampling=_sampling(settings),
                    advance=advance,
                )
                for number, text in zip(numbers, texts, strict=True):
                    results[number] = text
        return results

    def _max_new_tokens(self, settings: dict[str, Any]) -> int:
        limit = int(settings.get("max_gen_toks") or settings.get("max_new_tokens") or 256)
        if limit >= self._model.config.max_seq_len:
            raise UserError(
                f"max_gen_toks={limit} leaves no room for a prompt in the model's context of "
                f"{self._model.config.max_seq_len}; lower it."
            )
        return limit


def _sampling(settings: dict[str, Any]) -> Sampling:
    temperature = settings.get("temperature") or 0.0
    if not temperature or not settings.get("do_sample", True):
        return Sampling(temperature=0.0)
    # 0 means "off" there.
    filters = {name: settings[name] for name in ("top_k", "top_p", "min_p") if settings.get(name)}
    return Sampling(temperature=temperature, **filters)
