"""Tuning runs from end to end: full, LoRA and QLoRA, and what takes their folders afterwards."""

import dataclasses
import functools
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from models import config, logits_of, make_adapter, make_run, params_of

from gemma_jax import adapted, runs
from gemma_jax.arguments import parse
from gemma_jax.cli_models import generate
from gemma_jax.completion import TextGenerator, complete
from gemma_jax.data.conversations import Conversations
from gemma_jax.errors import UserError
from gemma_jax.exchange import export_model, import_model
from gemma_jax.experiment import Experiment, run
from gemma_jax.generation.sampling import Sampling
from gemma_jax.training.loop import LoopConfig
from gemma_jax.training.metrics import read_metrics
from gemma_jax.training.objective import Xent
from gemma_jax.training.optim import AdamW, Muon
from gemma_jax.training.weights import weights_hash
from gemma_jax.tuning.lora import Lora, QLora, join
from gemma_jax.tuning.sft import Sft

GREEDY = Sampling(temperature=0)
TEXT = [[2, *range(110, 150)]]
ADAPTERS = {
    "full": None,
    "lora": Lora(rank=4, alpha=8.0, dropout=0.1, targets=("query", "down", "embedding")),
    "qlora": QLora(rank=4, alpha=8.0),
}


def scorer(conversation, reply):
    return {"length": len(reply), "answer": float(conversation["n"])}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The working directory of these tests, with a base and conversations."""
    path = tmp_path_factory.mktemp("work")
    make_run(path / "base", config())
    rows = [
        {"prompt": f"say {i % 7} {i}", "completion": "abcdefg"[i % 7], "n": 5} for i in range(60)
    ]
    (path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        yield path


@pytest.fixture(scope="module")
def experiment(folder):
    return Experiment(
        name="tuned",
        init="base",
        data=Conversations(sources=("a.jsonl",)),
        objective=Sft(replies=2, max_new_tokens=4, scorer=scorer),
        optimizer=AdamW(learning_rate=3e-3),
        epochs=2,
        batch_tokens=512,
        seq_len=64,
        train=LoopConfig(log_every=1, eval_every=50, checkpoint_every=2),
    )


@pytest.fixture(scope="module")
def results(experiment):
    return {
        name: run(dataclasses.replace(experiment, name=name, adapter=adapter))
        for name, adapter in ADAPTERS.items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_run_learns_and_says_what_its_replies_are_worth(results, name) -> None:
    records = read_metrics(Path("runs") / name)
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] * 0.8
    metrics = results[name]["metrics"]
    assert {"valid/exact_match", "valid/loss", "valid/bits_per_byte"} <= metrics.keys()
    assert metrics["valid/answer"] == 5


@pytest.mark.slow
def test_the_first_step_sees_the_base(results) -> None:
    """LoRA starts as its base exactly; NF4 moves it a little."""
    first = {name: read_metrics(Path("runs") / name)[0]["loss"] for name in ADAPTERS}
    np.testing.assert_allclose(first["lora"], first["full"], rtol=1e-6)
    assert 1e-6 < abs(first["qlora"] / first["full"] - 1) < 0.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_a_resumed_run_repeats_the_numbers(experiment, results, name) -> None:
    path, before = Path("runs") / name, params_of(Path("runs") / name)
    last = max(int(step.name) for step in (path / "checkpoints").glob("*"))
    shutil.rmtree(path / "checkpoints" / str(last))
    (path / "result.json").unlink()
    again = run(dataclasses.replace(experiment, name=name, adapter=ADAPTERS[name]))
    for metric in ("loss", "valid/loss", "grad_norm"):
        assert again["metrics"][metric] == results[name]["metrics"][metric]
    for key, value in params_of(path).items():
        np.testing.assert_array_equal(value, before[key])


@pytest.mark.slow
def test_a_checkpoint_holds_the_adapter_alone(results) -> None:
    settings = ADAPTERS["lora"]
    described = json.loads((Path("runs/lora") / adapted.FILE).read_text())
    assert described["base"] == "base"
    assert described["base_hash"] == weights_hash(runs.load_model("base").params)
    model = runs.load_model("base").model
    tree = adapted.load_adapter(Path("runs/lora"), None, settings, model)
    names = {key[0].key for key, _ in jax.tree.leaves_with_path(tree)}
    assert names == {"embedder", "periods"}
    size = sum(x.size for x in jax.tree.leaves(tree))
    assert size < sum(x.size for x in params_of(Path("base")).values()) / 4


@pytest.mark.slow
def test_muon_trains_an_adapter(experiment) -> None:
    muon = dataclasses.replace(
        experiment,
        name="muon",
        adapter=ADAPTERS["lora"],
        optimizer=Muon(learning_rate=1e-2),
        objective=Sft(replies=0),
    )
    run(muon)
    losses = [record["loss"] for record in read_metrics(muon.folder) if "loss" in record]
    assert losses[-1] < losses[0] * 0.8


def test_a_qlora_is_the_model_that_was_trained(folder) -> None:
    """The merged model of its folder against adapter and packed base, one beside the other."""
    settings = QLora(rank=3, targets=("query", "output", "gate", "embedding"))
    make_adapter(folder / "q", folder / "base", settings)
    model = runs.load_model("base").model
    base = adapted.load_frozen(
        runs.open_base("base"), settings, model, lambda value, _: jax.device_put(value)
    )
    tree = adapted.load_adapter(folder / "q", None, settings, model)
    params = join(settings, tree, base, None)
    apart = jax.jit(lambda p, t: model.logits(p, model.hidden(p, t))[0])(params, np.array(TEXT))
    (merged,) = logits_of(folder / "q", TEXT)
    np.testing.assert_allclose(merged, apart, rtol=0, atol=1e-5 * np.abs(merged).max())
    (plain,) = logits_of(folder / "base", TEXT)
    assert np.abs(merged - plain).max() > 0.1


@pytest.fixture(scope="module")
def two(folder):
    settings = Lora(rank=2, alpha=64.0, targets=("query", "down"))
    make_adapter(folder / "one", folder / "base", settings, seed=1)
    make_adapter(folder / "two", folder / "base", dataclasses.replace(settings, rank=5), seed=2)


@functools.cache  # of the working directory, which is one
def say_3(place: str) -> str:
    return complete(place, ["say 3"], max_new_tokens=8, sampling=GREEDY)[0]


def assert_same(first: Path, second: Path) -> None:
    ours, theirs = params_of(first), params_of(second)
    for key, value in ours.items():
        np.testing.assert_array_equal(value, theirs[key])


def test_adapters_are_switched_by_request(two) -> None:
    prompts = ["say 3", "say 3", "say 3"]
    writer = TextGenerator("base", adapters={"first": "one", "second": "two"})
    asked = ["second", None, "first"]
    ours = writer.complete(prompts, adapters=asked, max_new_tokens=8, sampling=GREEDY)
    wanted = [say_3(place) for place in ("two", "base", "one")]
    assert [result.text for result in ours] == wanted
    assert len(set(wanted)) == 3
    with pytest.raises(UserError, match="there are 2 adapters; say for each"):
        writer.complete(prompts)
    with pytest.raises(UserError, match="there is no adapter 'third'; there are: first, second"):
        writer.complete(prompts, adapters=["third"] * 3)


def test_the_command_line_names_adapters(two, folder, capsys) -> None:
    lines = [{"prompt": "say 3", "adapter": "one"}, {"prompt": "say 3", "adapter": None}]
    (folder / "asked.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ["--temperature", "0", "--max-new-tokens", "8", "--json"]
    adapters = ["--adapter", "one", "--adapter", "other=two"]
    generate(parse(["generate", "base", "--file", "asked.jsonl", *adapters, *options]))
    texts = [row["text"] for row in json.loads(capsys.readouterr().out)]
    assert texts == [say_3("one"), say_3("base")]
    (folder / "asked.jsonl").write_text(json.dumps(lines[0]))  # alone, and none given
    with pytest.raises(UserError, match="there is no adapter 'one'; none was given"):
        generate(parse(["generate", "base", "--file", "asked.jsonl"]))


def test_peft_there_and_back(two, folder, tmp_path) -> None:
    value = export_model("two", tmp_path / "peft", format="peft")
    import_model(tmp_path / "peft", tmp_path / "again", base="base")
    assert_same(tmp_path / "again", Path("two"))
    assert value["parameters"] < 20_000
    with pytest.raises(UserError, match="give the run of its base"):
        import_model(tmp_path / "peft", tmp_path / "more")
    with pytest.raises(UserError, match="holds a whole model and no adapter"):
        export_model("base", tmp_path / "no", format="peft")


def test_a_merged_export_holds_the_sum(two, tmp_path) -> None:
    export_model("two", tmp_path / "hf", format="hf", dtype="f32")
    import_model(tmp_path / "hf", tmp_path / "again")
    assert_same(tmp_path / "again", Path("two"))


def test_another_base_is_refused(two, folder, tmp_path) -> None:
    shutil.copytree("one", tmp_path / "one")
    make_run(tmp_path / "base", config(), seed=9)
    described = json.loads((tmp_path / "one" / adapted.FILE).read_text())
    described["base"] = str(tmp_path / "base")
    (tmp_path / "one" / adapted.FILE).write_text(json.dumps(described))
    with pytest.raises(UserError, match="is not the base that the adapter was trained on"):
        runs.load_model(tmp_path / "one")
    with pytest.raises(UserError, match="has other weights; give that base"):
        TextGenerator(tmp_path / "base", adapters={"a": folder / "one"})
    with pytest.raises(UserError, match="holds an adapter, which is no base"):
        TextGenerator("two", adapters={"a": "one"})
    described |= {"base": "gone", "base_from_here": "../gone"}
    (tmp_path / "one" / adapted.FILE).write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"the base gone of the adapter .* is not there"):
        runs.load_model(tmp_path / "one")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": Xent()}, r"objective=Sft\(\.\.\.\) and data=Conversations"),
        ({"tokens": 4096}, "give tokens, or with conversations epochs, and not both"),
        ({"epochs": None}, "give tokens, or with conversations epochs, and not both"),
        ({"init": None, "adapter": Lora()}, "an adapter needs the weights"),
        ({"init": "nowhere", "model": None}, "nowhere is not the folder of a run"),
    ],
)
def test_settings_that_do_not_fit_are_refused(experiment, changes, message) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(experiment, **changes)


def test_what_cannot_be_trained_is_refused_before(experiment, folder, tmp_path) -> None:
    wide = dataclasses.replace(experiment, model=config(mlp_dim=128), name="wide")
    with pytest.raises(UserError, match=r"init='base' does not fit model: parameter .*mlp"):
        run(wide)
    with pytest.raises(UserError, match=r"the scorer returns 'no' for a\.jsonl line"):
        run(dataclasses.replace(experiment, name="s", objective=Sft(scorer=lambda c, r: "no")))
    with pytest.raises(UserError, match="new ones leave the model's context of 256"):
        run(dataclasses.replace(experiment, name="l", objective=Sft(max_new_tokens=250)))
    assert not list(Path("runs").glob("wide/*"))


@pytest.mark.slow
def test_other_conversations_are_refused_at_a_resume(experiment, folder) -> None:
    own = folder / "b.jsonl"
    shutil.copy("a.jsonl", own)
    changed = dataclasses.replace(
        experiment,
        name="changed",
        data=Conversations(sources=("b.jsonl",)),
        objective=Sft(replies=0),
    )
    run(changed)
    (changed.folder / "result.json").unlink()
    own.write_text(own.read_text().replace("say 3", "say 4", 1))
    with pytest.raises(UserError, match="the conversations are not those that"):
        run(changed)
