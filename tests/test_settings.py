"""Settings by dotted path: what is changed, what is refused, what is written down."""

import dataclasses

import pytest

from gemma_jax.errors import UserError
from gemma_jax.model.config import tiny
from gemma_jax.settings import differences, override, parse_assignments, to_json
from gemma_jax.training.optim import AdamW, Cosine, Muon


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    model: object = dataclasses.field(default_factory=tiny)
    optimizer: AdamW | Muon = AdamW()
    sources: dict = dataclasses.field(default_factory=lambda: {"a": tiny()})


def test_changes_by_path():
    page = override(
        Page(),
        {
            "model.attn_pattern": "LG",
            "optimizer": Muon(),
            "optimizer.learning_rate": 1,
            "sources.a.head_dim": 16,
        },
    )
    assert page.model.attn_pattern == "LG"
    assert page.optimizer == Muon(learning_rate=1.0)
    assert isinstance(page.optimizer.learning_rate, float)
    assert page.sources["a"].head_dim == 16


def test_settings_that_must_fit_each_other_change_together():
    """Either change alone is refused: 4 is no multiple of 3, and 6 none of 4."""
    page = override(Page(), {"model.num_kv_heads": 3, "model.num_heads": 6})
    assert (page.model.num_heads, page.model.num_kv_heads) == (6, 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.heads": 1}, "no setting 'heads' in ModelConfig.*num_heads"),
        ({"modle": 1}, "no setting 'modle'.*model, optimizer"),
        ({"model.attn_pattern.x": 1}, "no setting 'x'"),
        ({"sources.b": 1}, "no setting 'b'.*there are: a"),
        ({"model.num_heads": "four"}, "num_heads='four' is of the wrong type.*int"),
        ({"model.num_heads": True}, "must be int"),
        ({"model.remat": "some"}, "'none' or 'dots' or 'full'"),
        ({"optimizer": "sgd"}, "AdamW or Muon"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(UserError, match=words):
        override(Page(), changes)


def test_command_line_values():
    known = {"Muon": Muon, "Cosine": Cosine}
    texts = ["a.b=3", "c=LG", "d=None", "e=Muon(learning_rate=1, schedule=Cosine(final=0.5))", "f="]
    muon = Muon(learning_rate=1.0, schedule=Cosine(final=0.5))
    expected = {"a.b": 3, "c": "LG", "d": None, "e": muon, "f": ""}
    assert parse_assignments(texts, known) == expected
    with pytest.raises(UserError, match="path=value"):
        parse_assignments(["a.b"], known)
    with pytest.raises(UserError, match="must name one of Cosine, Muon"):
        parse_assignments(["a=Adam(x=1)"], known)
    with pytest.raises(UserError, match="cannot be made"):
        parse_assignments(["a=Muon(rate=1)"], known)


def test_differences_name_the_path():
    ours, theirs = to_json(Page()), to_json(override(Page(), {"model.num_layers": 2}))
    assert differences(ours, theirs) == [("model.num_layers", 4, 2)]
    assert differences(ours, ours) == []


def test_a_setting_that_is_newer_than_a_run_has_its_default_there():
    """Everything but the choice of an optimizer and its rate is left out of what was saved."""
    saved = to_json(Page())
    saved["optimizer"] = {"type": "AdamW", "learning_rate": 1e-3}
    del saved["model"]
    assert differences(Page(), saved) == []
    changed = override(Page(), {"optimizer.b1": 0.5, "model.num_layers": 2})
    assert differences(changed, saved) == [("model.num_layers", 2, 4), ("optimizer.b1", 0.5, 0.9)]
    assert ("optimizer.type", "Muon", "AdamW") in differences(Page(optimizer=Muon()), saved)
