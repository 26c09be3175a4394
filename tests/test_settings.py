"""Settings by dotted path: what is changed, what is refused, what is written down."""

import dataclasses

import pytest

from gemma_jax.data.mixture import Stage
from gemma_jax.data.tokens import Corpus
from gemma_jax.distill.objective import Distill
from gemma_jax.errors import UserError
from gemma_jax.experiment_config import SETTINGS, Experiment, TeacherRun
from gemma_jax.model.config import tiny
from gemma_jax.settings import differences, override, parse_assignments, to_json
from gemma_jax.sharding import MeshConfig
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.objective import Xent
from gemma_jax.training.optim import AdamW, Cosine, Muon


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    model: object = dataclasses.field(default_factory=tiny)
    optimizer: AdamW | Muon = AdamW()
    objective: Xent | Distill = Xent()
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
        ({"optimizer": "Muon"}, r"such as 'optimizer=Muon\(learning_rate=0.001\)'"),
        ({"optimizer": {"type": "Muon"}}, r"such as 'optimizer=Muon\(learning_rate=0.001\)'"),
        ({"optimizer.momentum": 1.0}, r"Muon has it: 'optimizer=Muon\(momentum=0.95\)'"),
        ({"objective": "Distill"}, r"""such as 'objective=Distill\(shards="sh/t1"\)'"""),
        ({"objective.shards": "x"}, r"""Distill has it: 'objective=Distill\(shards="sh/t1"\)'"""),
        ({"optimizer.learning_rate": 0}, r"^optimizer\.learning_rate=0\.0 must be positive"),
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
    with pytest.raises(UserError, match="sets 'rate', which Muon does not have; it has: learning"):
        parse_assignments(["a=Muon(rate=1)"], known)
    with pytest.raises(UserError, match="must say shards"):
        parse_assignments(["a=Distill()"], {"Distill": Distill})
    with pytest.raises(UserError, match='must be in quotes: "sh/t1"'):
        parse_assignments(["a=Distill(shards=sh/t1)"], {"Distill": Distill})


def test_settings_inside_of_dicts_and_tuples():
    text = "x=Mixture(sources={'a': Corpus(path='p', sources=('s',)), 'b': 'q'}, "
    text += "stages=[Stage(until=1, weights={'a': 1})])"
    (mixture,) = parse_assignments([text], SETTINGS).values()
    assert mixture.sources["a"] == Corpus(path="p", sources=("s",))
    assert mixture.stages == (Stage(until=1.0, weights={"a": 1}),)
    assert parse_assignments(["x={[]: 1}"], SETTINGS) == {"x": "{[]: 1}"}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: AdamW(learning_rate="1e-3"), r"AdamW\.learning_rate='1e-3' .* must be float"),
        (lambda: AdamW(b2=1), r"AdamW\.b2=1\.0 must be at least 0 and below 1"),
        (lambda: Muon(momentum=-0.1), r"momentum=-0\.1"),
        (lambda: AdamW(weight_decay=-1), r"weight_decay=-1\.0"),
        (lambda: Cosine(final="x"), r"Cosine\.final='x'"),
        (lambda: Xent(z_loss=-1), r"z_loss=-1\.0"),
        (lambda: LoopConfig(log_every="5"), r"LoopConfig\.log_every='5' .* must be int"),
        (lambda: Corpus(path="p", sources=("s",), valid_fraction="1"), "valid_fraction='1'"),
        (lambda: Stage(until="1", weights={}), r"Stage\.until='1'"),
        (lambda: Distill(shards=3), r"Distill\.shards=3 .* str or TeacherJob"),
        (lambda: TeacherRun(path="p", teacher="t", draws="8"), r"TeacherRun\.draws='8'"),
        (lambda: MeshConfig(data="2"), r"MeshConfig\.data='2'"),
        (
            lambda: Experiment(
                name="a", model=tiny(), data="d", tokens="1e6", batch_tokens=256, seq_len=32
            ),
            r"Experiment\.tokens='1e6' is of the wrong type; it must be int",
        ),
    ],
)
def test_each_settings_class_checks_its_own(make, words):
    with pytest.raises(UserError, match=words):
        make()


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
