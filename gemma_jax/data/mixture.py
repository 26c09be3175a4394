"""What a run reads: one token set, or a mixture of several in stages."""

from collections.abc import Mapping
from dataclasses import dataclass

from gemma_jax.data.tokenizer import Tokenizer
from gemma_jax.data.tokens import Corpus, TokenSet, build_tokens
from gemma_jax.errors import UserError
from gemma_jax.settings import check_types


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training with fixed weights.

    Args:
      until: share of all tokens at which it ends, in (0, 1]; the last stage ends at 1.
      weights: name of a source to its share of the tokens; any positive numbers, normalised.
    """

    until: float
    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several corpora in stages: `Stage(until=0.8, weights={"a": 0.7, "b": 0.3})` and so on.

    `sources` name token sets, which must share one tokenizer; the stages say which part of the
    run draws from which, by weight in tokens.
    """

    sources: dict[str, Corpus | str]
    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        check_types(self)


def open_tokens(data: Corpus | str) -> TokenSet:
    """A token set by its folder, or by its description: built where it is not yet."""
    return TokenSet.open(data) if isinstance(data, str) else build_tokens(data)


def open_sources(data: Corpus | Mixture | str) -> dict[str, TokenSet]:
    """The token sets of a run by name, all of one tokenizer; a single one is called `data`."""
    if not isinstance(data, Mixture):
        return {"data": open_tokens(data)}
    if not data.sources:
        raise UserError("data.sources is empty; a mixture needs at least one corpus.")
    sets = {name: open_tokens(source) for name, source in data.sources.items()}
    first = next(iter(data.sources))
    for tokens in sets.values():
        check_same_tokenizer(tokens, sets[first].tokenizer, f"source '{first}'")
    return sets


def check_same_tokenizer(tokens: TokenSet, tokenizer: Tokenizer, owner: str) -> None:
    if tokens.tokenizer.hash != tokenizer.hash:
        raise UserError(
            f"the token set {tokens.path} was made with another tokenizer "
            f"({tokens.tokenizer.hash[:12]}) than {owner} ({tokenizer.hash[:12]}); build it anew "
            "with that tokenizer's model file."
        )
