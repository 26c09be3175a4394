"""The command line: the whole path once on tiny sizes, and a sentence for every mistake."""

import contextlib
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import (
    BUILD,
    EXPERIMENT,
    cut,
    edited,
    flipped,
    options_of,
    without,
    write_inputs,
)

from gemma_jax import arguments, cli, cli_files, report

TEACHER = "teacher runs/tiny tokens"
PROCESSES = {"--coordinator", "--distributed", "--num-processes", "--process-id"}
OPTIONS = {
    "quickstart": {"--arg", "--json", "--set", *PROCESSES},
    "data build": {
        *("--json", "--source", "--text-field", "--tokenizer", "--valid-fraction"),
        *("--vocab-size", "--workers"),
    },
    "tokenizer train": {"--json", "--source", "--text-field", "--vocab-size"},
    "train": {"--arg", "--json", "--point", "--replay", "--set", *PROCESSES},
    "teacher": {
        *("--batch-size", "--draws", "--json", "--method", "--num-sequences", "--seed"),
        *("--mesh", "--seq-len", *PROCESSES),
    },
    "teacher verify": {"--checkpoint", "--json", "--mesh", "--sample", *PROCESSES},
    "sweep": {
        *("--arg", "--collect", "--json", "--list", "--only", "--seeds", "--set", *PROCESSES),
    },
    "eval": {
        *("--batch-size", "--batch-tokens", "--compute-dtype", "--data", "--json", "--limit"),
        *("--mesh", "--output", "--seq-len", "--source", "--tasks", "--text-field", *PROCESSES),
        *("--conversations", "--few-shot", "--free", "--max-new-tokens", "--prompt-format"),
        *("--quantization", "--replies", "--schema", "--scorer"),
    },
    "generate": {
        "--adapter",
        *("--chat", "--file", "--json", "--logprobs", "--max-new-tokens", "--min-p", "--prompt"),
        *("--repetition-penalty", "--seed", "--stop", "--temperature", "--top-k", "--top-p"),
        *("--mesh", "--schema", "--regex", "--grammar", "--on-limit", *PROCESSES),
    },
    "import": {"--base", "--json"},
    "export": {"--dtype", "--format", "--json"},
    "inspect": {"--arg", "--json", "--seq-len", "--set"},
    "bench": {
        *("--against", "--batch", "--batch-tokens", "--compute-dtype", "--data", "--documents"),
        *("--json", "--mesh", "--microbatches", "--pattern", "--peer-python", "--plot"),
        *("--preset", "--remat", "--repeats", "--rules", "--seq-len", "--set", "--shards"),
        *("--steps", "--sweep", "--window"),
    },
    "plan": {
        *("--arg", "--count", "--device", "--json", "--point", "--rows", "--search", "--set"),
        *("--slices", "--step", "--topology"),
    },
    "tpu": set(),
    "gke": set(),
    "slurm": set(),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What every verb prints with --json, in a folder that holds all that they wrote."""
    folder = tmp_path_factory.mktemp("cli")
    write_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        distilled = "objective=Distill(shards='shards')"
        verbs = {
            "data": BUILD,
            "train": "train exp.py",
            "teacher": "teacher runs/tiny tokens shards --seq-len 32 --draws 8 --num-sequences 40",
            "verify": "teacher verify shards --checkpoint runs/tiny --sample 4",
            "distilled": f"train exp.py --arg name=distilled --set {distilled}",
            "eval": "eval runs/distilled --data tokens",
            "generate": "generate runs/distilled --prompt abc --prompt de --max-new-tokens 4",
            "inspect": "inspect runs/distilled",
        }
        yield {name: printed(f"{line} --json") for name, line in verbs.items()}


def printed(line: str) -> Any:
    """The one JSON value that a command prints on stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(line.split())
    return json.loads(out.getvalue())


@pytest.fixture
def sandbox(made: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder to do damage in."""
    shutil.copytree(Path.cwd(), tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence on stderr of a command that has to end with code 2."""
    with pytest.raises(SystemExit) as end:
        cli.main(argv)
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith(".")
    return last


def test_the_whole_path(made: dict[str, Any]) -> None:
    assert made["data"]["splits"]["train"]["tokens"] > 0
    assert made["train"]["steps"] == 4
    assert made["teacher"]["draws"] == 8
    assert made["verify"]["records"] == 40
    assert made["verify"]["recomputed_records"] == 4
    assert made["verify"]["differing_tokens"] == 0
    assert made["distilled"]["name"] == "distilled"
    assert made["eval"]["bits_per_byte"] == pytest.approx(made["distilled"]["bits_per_byte"], 0.2)
    assert [one["prompt"] for one in made["generate"]] == ["abc", "de"]
    assert made["inspect"]["parameters"]["total"] > made["inspect"]["parameters"]["embedding"]
    assert {"flops_per_token", "kv_cache_bytes"} <= made["inspect"].keys()


def test_finished_work_returns_at_once(made: dict[str, Any]) -> None:
    assert printed("train exp.py --json") == made["train"]
    again = printed(
        "teacher runs/tiny tokens shards --seq-len 32 --draws 8 --num-sequences 40 --json"
    )
    assert again == made["teacher"]


SHORT = {
    BUILD: "train                 54 ",
    f"{TEACHER} shards --seq-len 32 --draws 8 --num-sequences 40": "unique ids a token   ",
    "teacher verify shards": "records                       40\n",
    "eval runs/tiny --data tokens": "bits per byte                 ",
}


@pytest.mark.parametrize("line", SHORT)
def test_figures_are_a_few_lines(
    line: str, made: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(line.split())
    out = capsys.readouterr().out
    assert SHORT[line] in out
    assert "{" not in out
    assert len(out.splitlines()) <= 10


def test_letters_of_a_pattern_that_are_cut_off_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for pattern, words in (("LLLLLG", "num_layers=4: LG is cut off\n"), ("LLLG", "layers  ")):
        cli.main(["inspect", "small", "--set", f"attn_pattern={pattern}"])
        assert words in capsys.readouterr().out.splitlines(keepends=True)[0]


@pytest.mark.parametrize("words", ["data build", "data", "data-build", "tokenizer train"])
def test_verbs_of_two_words_look_so_in_their_help(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main([*words.split(), "--help"])
    out = capsys.readouterr().out
    assert f"usage: gemma-jax {words.split()[0].replace('-', ' ')} " in out
    assert "ids in all (default: 8192)" in " ".join(out.split())
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert "  data build " in capsys.readouterr().out


def test_the_points_of_a_sweep_are_listed(made: dict[str, Any]) -> None:
    assert printed("sweep exp.py --list --json") == ["a", "b"]


def test_one_point_is_trained_with_the_seed_that_is_set(made: dict[str, Any]) -> None:
    given = arguments.parse(["train", "exp.py", "--point", "a", "--set", "seed=3"])
    assert cli_files.load_sweep(Path("exp.py"), given).seeds == (3,)


def test_verbs_and_options_are_frozen() -> None:
    assert options_of(arguments.parser()) == OPTIONS
    assert cli._VERBS.keys() == OPTIONS.keys()


GENERATE = "generate runs/tiny --prompt a"
MISTAKES = {
    "nonsense": "nonsense",
    "data": "'data' needs its second word: data build",
    "tokenizer x": "tokenizer train",
    "data build x": "--source",
    "data build x --source missing.txt": "missing.txt does not exist",
    "data build x --source *.none": "matches no file",
    "data build x --source empty.txt": "has no text",
    "data build x --source latin.txt": "not UTF-8 at byte 3",
    "data build x --source broken.jsonl": "line 2 is not JSON",
    "data build x --source field.jsonl": 'no text under "text" (it has: body); give the right name',
    "data build x --source good.jsonl --vocab-size 100000": "vocab_size 100000 is too large",
    "data build x --source good.jsonl --vocab-size 5": "vocab_size 5",
    "data build x --source good.jsonl --valid-fraction 2": "valid_fraction 2.0",
    "data build x --source good.jsonl --workers 0": "--workers: 0",
    "data build x --source good.jsonl --tokenizer latin.txt": "not a SentencePiece model",
    "data build tokens --source good.jsonl --vocab-size 420": "there 400, here 420",
    "data build good.jsonl --source good.jsonl --vocab-size 400": "in the way",
    "tokenizer train tokens --source good.jsonl --vocab-size 400": "in the way",
    "tokenizer train x/t.model --source empty.txt": "no text",
    "tokenizer train tokens/tokenizer.model --source good.jsonl --vocab-size 410": "another path",
    "train nowhere.py": "nowhere.py",
    "train nothing.py": "neither BASE",
    "train syntax.py": "not valid Python",
    "train mistake.py": "mistake.py line 2: NameError",
    "train kind.py": "BASE of kind.py is a int",
    "train exp.py --arg nope=1": "takes no argument 'nope'",
    "train exp.py --arg tokens=many": "--arg tokens='many'",
    "train exp.py --point c": "no point 'c'",
    "train exp.py --set nope=1": "no setting 'nope'",
    "train exp.py --set model.nope=1": "no setting 'nope'",
    "train exp.py --set seq_len": "path=value",
    "train exp.py --set seq_len=abc": "seq_len='abc'",
    "train exp.py --set seq_len=128": "seq_len=128 is over the model's context",
    "train exp.py --set batch_tokens=250": "batch_tokens=250",
    "train exp.py --set tokens=10": "tokens=10",
    "train exp.py --arg name=new --set model.vocab_size=300": "vocab_size=300",
    "train exp.py --arg name=new --set data=tokens/nowhere": "/tokens/nowhere/manifest.json is not",
    "train exp.py --set optimizer=Foo()": "Foo()",
    f"{GENERATE} --mesh fsdp:2": "'fsdp:2' is no mesh; give some of data, fsdp, tensor, rules",
    f"{GENERATE} --mesh tensor=two": "tensor=two must be a whole number",
    f"{GENERATE} --mesh tensor=3": "does not fit",
    f"{GENERATE} --mesh rules=none": "rules",
    f"{GENERATE} --process-id -1": "--process-id: -1",
    "train exp.py --set optimizer.learning_rate=0.1": "runs/tiny holds a run",
    "train exp.py --set name=../../x": "name='../../x'",
    "train exp.py --set seed=99999999999999999999": "seed=99999999999999999999",
    "sweep nothing.py": "neither BASE",
    "sweep equal.py": "'a' and 'b' are equal",
    "sweep exp.py --only c": "no point 'c'; there are: a, b",
    "sweep exp.py --collect nowhere": "nowhere/tiny has no finished run",
    "sweep exp.py --collect x --only a": "not allowed with",
    "sweep exp.py --seeds a,b": "--seeds 'a,b'",
    "sweep exp.py --seeds 0,0": "a seed twice",
    "sweep exp.py --set seed=3": "use --seeds 3",
    "quickstart exp.py": "needs 'scratch'",
    f"{TEACHER} x --seq-len 999": "seq_len=999",
    f"{TEACHER} x --seq-len 32 --num-sequences 0": "--num-sequences: 0",
    f"{TEACHER} shards --seq-len 32 --draws 8 --num-sequences 41": "num_records = 40, not 41",
    f"{TEACHER} shards --seq-len 32 --num-sequences 40 --draws 9": "draws = 8, not 9",
    f"{TEACHER} good.jsonl --seq-len 32": "good.jsonl",
    "teacher nowhere tokens x --seq-len 32": "nowhere is not the folder of a run",
    "teacher runs/tiny nowhere x --seq-len 32": "nowhere holds no finished token set",
    "teacher verify nowhere": "nowhere",
    "teacher verify tokens": "gemma_jax tokens",
    "teacher verify shards --checkpoint runs/distilled": "not the teacher",
    "teacher verify shards --sample 0": "--sample: 0",
    "eval runs/tiny": "either",
    "eval runs/tiny --data tokens --source good.jsonl": "not both",
    "eval runs/tiny --data tokens --seq-len 99": "seq_len=99",
    "eval runs/tiny --data tokens --batch-size 0": "--batch-size: 0",
    "eval runs/tiny/checkpoints/3 --data tokens": "no checkpoint of step 3",
    f"{GENERATE} --temperature -1": "temperature=-1.0",
    f"{GENERATE} --top-p 2": "top_p=2.0",
    f"{GENERATE} --top-k 0": "--top-k: 0",
    f"{GENERATE} --max-new-tokens 999": "999 new ones leave",
    f"{GENERATE} --seed -1": "--seed: -1",
    "generate runs/tiny": "--prompt",
    "generate runs/tiny --prompt \udcff": "Unicode",
    "generate runs --prompt a": "has runs inside; give runs/distilled, runs/tiny.",
    "inspect runs": "has runs inside; give runs/distilled, runs/tiny.",
    "inspect tokens": "tokens is not the folder of a run",
    "inspect gemma9": "'gemma9' is no preset",
    "inspect nowhere.py": "nowhere.py",
    "inspect gemma3_1b --set nope=1": "no setting 'nope'",
    "inspect gemma3_1b --seq-len 99999": "--seq-len 99999",
    "inspect gemma3_1b --arg a=1": "--arg",
}


@pytest.fixture(scope="module")
def mistaken(made: dict[str, Any]) -> None:
    Path("empty.txt").write_text("")
    Path("latin.txt").write_bytes(b"caf\xe9 bar" * 50)
    Path("broken.jsonl").write_text('{"text": "abc"}\n{"text": "ab\n')
    Path("field.jsonl").write_text('{"body": "abc"}\n')
    Path("nothing.py").write_text("x = 1\n")
    Path("syntax.py").write_text("def :\n")
    Path("mistake.py").write_text("x = 1\nBASE = Experiment()\n")
    Path("kind.py").write_text("BASE = 3\n")
    Path("equal.py").write_text(EXPERIMENT + "SWEEP = points(BASE, a={}, b={'seq_len': 32})\n")


@pytest.mark.usefixtures("mistaken")
@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_sentence(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert MISTAKES[line] in refused(line.split(" "), capsys)


DAMAGE = {
    "shard-cut": ("shards/*.arrayrecord", cut, "teacher verify shards", "manifest says"),
    "shard-flipped": ("shards/*.arrayrecord", flipped, "teacher verify shards", "is damaged"),
    "manifest-cut": ("shards/manifest.json", cut, "teacher verify shards", "not valid JSON"),
    "tokens-cut": ("tokens/*.arrayrecord", cut, "eval runs/tiny --data tokens", "is damaged"),
    "tokenizer-cut": ("runs/tiny/tokenizer.model", cut, GENERATE, "not a SentencePiece model"),
    "tokenizer-empty": ("runs/tiny/tokenizer.model", lambda _: b"", GENERATE, "SentencePiece"),
    "model-cut": ("runs/tiny/model.json", cut, GENERATE, "not valid JSON"),
    "model-list": ("runs/tiny/model.json", lambda _: b"[]", GENERATE, "model.json"),
    "model-unknown": ("runs/tiny/model.json", edited(foo=1), GENERATE, "foo"),
    "model-type": ("runs/tiny/model.json", edited(num_layers="x"), GENERATE, "model.json"),
    "model-none": ("runs/tiny/model.json", edited(num_layers=None), GENERATE, "num_layers"),
    "model-other": ("runs/tiny/model.json", edited(embed_dim=32), GENERATE, "another model"),
    "shards-fieldless": (
        *("shards/manifest.json", without("shards"), "teacher verify shards"),
        "does not say shards",
    ),
    "tokens-fieldless": (
        *("tokens/manifest.json", without("splits"), "eval runs/tiny --data tokens"),
        "does not say splits",
    ),
    "experiment-none": (
        *("runs/tiny/experiment.json", lambda _: b"{}"),
        *("train exp.py", "does not say commit"),
    ),
    "experiment-list": (
        "runs/tiny/experiment.json",
        lambda _: b"[]",
        "train exp.py",
        "no JSON object",
    ),
    "experiment": (
        *("runs/tiny/experiment.json", lambda _: b"{}"),
        *("eval runs/tiny --data tokens", "experiment.json"),
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_one_sentence(
    name: str, sandbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pattern, harm, line, words = DAMAGE[name]
    files = [path for path in sandbox.glob(pattern) if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(harm(path.read_bytes()))
    assert words in refused(line.split(), capsys)


def test_text_that_comes_twice_is_scored_twice(sandbox: Path) -> None:
    text = Path("good.jsonl").read_text().splitlines(keepends=True)[0]
    Path("once.jsonl").write_text(text)
    Path("twice.jsonl").write_text(text * 2)
    once, twice = (printed(f"eval runs/tiny --source {n}.jsonl --json") for n in ("once", "twice"))
    assert twice["bytes"] == 2 * once["bytes"]


@pytest.mark.parametrize("name", ["runs/tiny/model.json", "runs/tiny/tokenizer.model"])
def test_a_file_that_cannot_be_read_is_not_called_unwritable(
    name: str, sandbox: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(name).unlink()
    Path(name).mkdir()
    said = refused(GENERATE.split(), capsys)
    assert name in said
    assert "write" not in said


def test_missing_weights_and_manifest(sandbox: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree("runs/tiny/checkpoints")
    Path("shards/manifest.json").unlink()
    assert "no checkpoint" in refused(GENERATE.split(), capsys)
    assert "not finished" in refused(["teacher", "verify", "shards"], capsys)


def test_nothing_is_printed_that_json_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    report.emit(
        arguments.parse(["inspect", "x", "--json"]),
        {"a": float("nan"), "b": [float("inf"), 1.5]},
        "",
    )
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5]}
