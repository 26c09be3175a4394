"""`gemma-jax bench`: what a measurement holds, what it counts, and what it refuses."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax._src import compiler
from models import TOKENIZER, VOCAB

from gemma_jax import arguments, cli, cli_bench
from gemma_jax.bench import run, sweep, training
from gemma_jax.bench.config import BenchConfig
from gemma_jax.bench.timing import ROW_KEYS, compile_times, empty_cache, spread
from gemma_jax.bench.training import mean_flops, utilisation
from gemma_jax.data.tokens import Corpus, build_tokens
from gemma_jax.model.config import ModelConfig, tiny

# One layer: cold compilation is part of what is measured.
TINY = ["--preset", "tiny", "--set", "num_layers=1", "--batch", "8", "--seq-len", "32"]
TINY += ["--repeats", "2", "--steps", "2"]
PARTS = {"attention", "mlp", "head", "optimizer", "lookup", "norms", "other"}


def configs(*line: str) -> list[BenchConfig]:
    return cli_bench._configs(arguments.parse(["bench", *line]))


def measured(what: str, *line: str) -> dict[str, Any]:
    """What the verb prints with --json."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["bench", what, *TINY, *line, "--json"])
    return json.loads(out.getvalue())


def check_row(row: dict[str, Any], tokens: int) -> None:
    assert tuple(row) == ROW_KEYS
    seconds, rate = row["seconds"], row["tokens_per_s"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    assert rate["max"] == pytest.approx(tokens / row["steps"] / seconds["min"])
    assert row["mfu"] is None  # no peak is known of a CPU
    assert row["peak_bytes"] is None
    assert row["host_peak_bytes"] > 2**20


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    return measured("train", "--documents", "4", "--microbatches", "1")


def test_a_program_is_traced_once_compiled_and_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    done = []

    def note(name: str, word: str) -> None:
        call = getattr(compiler, name)

        def noted(*given: Any) -> Any:
            result = call(*given)
            if result != (None, None):  # what is not in the cache
                done.append(word)
            return result

        monkeypatch.setattr(compiler, name, noted)

    def lower() -> Any:
        done.append("traced")
        return jax.jit(lambda x: x + 3).lower(np.ones(3, np.float32))

    note("backend_compile_and_load", "compiled")
    note("_cache_read", "loaded")
    with empty_cache():
        cold, cached, program = compile_times(lower)
    assert done == ["traced", "compiled", "loaded"]
    assert min(cold, cached) > 0
    np.testing.assert_array_equal(program(np.ones(3, np.float32)), 4)


def test_training_is_timed_and_taken_apart(trained: dict[str, Any]) -> None:
    (row,) = trained["rows"]
    check_row(row, 2 * 8 * 32)
    assert (row["batch"], row["seq_len"], row["steps"], row["repeats"]) == (8, 32, 2, 2)
    assert 2.5 < row["documents"] < 5.5
    assert 3 < row["loss"] < 7  # log 128 = 4.85 at the start
    assert 0 <= row["data_wait"] <= 1
    assert row["program_bytes"] > 3 * 4 * 128 * 32  # at the least the embedding and its moments
    assert row["compile_s"] > 0
    assert row["compile_cached_s"] > 0
    assert {"attention", "mlp", "head", "optimizer"} <= row["parts"].keys() <= PARTS
    assert sum(row["parts"].values()) == pytest.approx(1)
    assert row["busy"] > 0
    assert trained["name"] == "gemma_jax"
    assert trained["model"]["embed_dim"] == 32
    assert trained["peers"] == []
    assert {"jax", "jaxlib"} <= trained["versions"].keys()


def test_the_program_that_is_looked_at_is_the_one_that_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compiled ahead of time, cold and cached, then called as the loop calls it: once in all."""
    loop_run, programs = training._Loop.run, []

    def spied(loop: training._Loop, steps: int) -> None:
        loop_run(loop, steps)
        cache = Path(jax.config.jax_compilation_cache_dir)
        programs.append({path.name for path in cache.glob("jit_step-*-cache")})

    monkeypatch.setattr(training._Loop, "run", spied)
    before = jax.config.jax_compilation_cache_dir
    measured("train", "--microbatches", "1")
    assert len(programs) == 4  # warm-up, two repeats, under the profiler
    assert all(len(names) == 1 for names in programs)
    assert jax.config.jax_compilation_cache_dir == before


@pytest.fixture(scope="module")
def real_tokens(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("real")
    texts = [json.dumps({"text": f"the {n} tokens of text {n * n} " * (5 + n)}) for n in range(40)]
    (folder / "texts.jsonl").write_text("\n".join(texts))
    corpus = Corpus(
        path=str(folder / "tokens"),
        sources=(str(folder / "texts.jsonl"),),
        tokenizer=str(TOKENIZER),
    )
    return str(build_tokens(corpus).path)


@pytest.mark.parametrize("what", ["data", "teacher"])
def test_tokens_on_disk_are_read_as_they_are(what: str, real_tokens: str) -> None:
    (row,) = measured(what, "--data", real_tokens, "--set", f"vocab_size={VOCAB}")["rows"]
    check_row(row, 2 * 8 * 32)
    assert row["documents"] is None  # they have their own, and nobody counted


def test_tokens_that_do_not_fit_are_refused(
    real_tokens: str, capsys: pytest.CaptureFixture[str]
) -> None:
    many = ["--set", f"vocab_size={VOCAB}", "--steps", "9000"]
    for line, words in (
        (["train", *TINY], f"has {VOCAB} ids and the model 128; give --set vocab_size={VOCAB}."),
        (["teacher", *TINY, *many], "--steps 9000 x --batch 8 sequences are over the"),
    ):
        with pytest.raises(SystemExit):
            cli.main(["bench", *line, "--data", real_tokens])
        assert words in capsys.readouterr().err


def test_distillation_reads_drawn_shards(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = measured("distill", "--documents", "2")["rows"]
    check_row(row, 2 * 8 * 32)
    assert row["what"] == "distill"
    assert row["parts"]["head"] > 0


def test_a_teacher_writes_to_disk() -> None:
    (row,) = measured("teacher")["rows"]
    check_row(row, 2 * 8 * 32)


def test_decoding_has_a_row_for_prompts_and_one_for_tokens(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["--preset", "tiny", "--batch", "2", "--seq-len", "16", "--steps", "8"]
    value = run.bench(configs("decode", *line, "--repeats", "2"))
    prefill, decode = value["rows"]
    check_row(prefill, 2 * 16)
    check_row(decode, 2 * 8)
    assert (prefill["what"], decode["what"]) == ("prefill", "decode")
    assert (prefill["steps"], decode["steps"]) == (1, 8)


def test_decode_measures_one_row_and_64_where_nothing_is_said() -> None:
    found = configs("decode")
    assert [config.batch for config in found] == [1, 64]
    assert {(config.seq_len, config.steps) for config in found} == {(1024, 256)}
    (one,) = configs("train")
    assert (one.batch, one.seq_len, one.model.vocab_size) == (8, 2048, 262_144)
    (one,) = configs("train", "--seq-len", "512", "--batch-tokens", "2048")
    assert one.batch == 4


def test_the_loader_alone(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["bench", "data", *TINY])
    out = capsys.readouterr().out.splitlines()
    assert out[2].split()[:4] == ["what", "batch", "seq_len", "tokens/s"]
    assert out[3].split()[:4] == ["gemma_jax", "data", "8", "32"]
    assert out[-1] == "memory is the host's: the device does not tell its own"


def test_options_change_the_model() -> None:
    options = ["--pattern", "LG", "--window", "4", "--remat", "full", "--compute-dtype"]
    mesh = ["--mesh", "fsdp=4,data=2", "--rules", "fsdp", "--set", "attn_softcap=50.0"]
    (config,) = configs("train", *TINY, *options, "bfloat16", *mesh)
    model = config.model
    assert (model.attn_pattern, model.sliding_window, model.remat) == ("LG", 4, "full")
    assert (model.compute_dtype, model.attn_softcap) == ("bfloat16", 50.0)
    assert (config.mesh.fsdp, config.mesh.data, config.mesh.rules) == (4, 2, "fsdp")


# By hand: 2 layers, D = 8, F = 16, 2 heads of 4, 1 kv head, V = 32, window 4, pattern LG.
HAND = ModelConfig(
    vocab_size=32,
    embed_dim=8,
    mlp_dim=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=4,
    max_seq_len=64,
    attn_pattern="LG",
    sliding_window=4,
)
MATRICES = 2 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16)  # q, k and v, output, gate up down
HEAD = 32 * 8


def by_hand(length: int) -> float:
    local = sum(min(i + 1, 4) for i in range(length)) / length
    everything = sum(i + 1 for i in range(length)) / length
    return 3 * (2 * (MATRICES + HEAD) + 4 * 2 * 4 * (local + everything))


def test_flops_by_hand() -> None:
    whole = np.ones((2, 16), np.int32)
    assert mean_flops(HAND, [whole]) == pytest.approx(by_hand(16), abs=1)
    parts = np.array([[1] * 6 + [2] * 10, [1] * 3 + [2] * 13])
    wanted = sum(n * by_hand(n) for n in (6, 10, 3, 13)) / 32
    assert mean_flops(HAND, [parts]) == pytest.approx(wanted, abs=1)
    assert mean_flops(HAND, [whole, parts]) == pytest.approx((by_hand(16) + wanted) / 2, abs=1)


def test_utilisation_by_hand() -> None:
    class Device:
        device_kind = "NVIDIA H100 80GB HBM3"

    row = {"tokens_per_s": spread([1e5, 2e5, 4e5])}
    assert utilisation(row, 1.5e9, [Device()] * 2) == pytest.approx(2e5 * 1.5e9 / (2 * 989e12))


REFUSED = {
    "bench nothing": "invalid choice: 'nothing'",
    "bench train --preset nope": "--preset 'nope' is no preset",
    "bench train --preset tiny --seq-len 65": "--seq-len 65 must lie between 2 and",
    "bench decode --preset tiny --seq-len 60 --steps 8": "64 less 8 new tokens",
    "bench train --preset tiny --seq-len 32 --documents 17": "--documents 17 do not fit",
    "bench train --preset tiny --batch 3 --microbatches 2": "--batch 3 does not divide",
    "bench train --preset tiny --batch 3": "does not divide by the 8 devices",
    "bench train --preset tiny --batch 0": "--batch: 0",
    "bench train --preset tiny --batch 1 --batch-tokens 64": "not allowed with",
    "bench train --preset tiny --batch-tokens 65": "no multiple of 64 tokens",
    "bench train --preset tiny --data nowhere": "nowhere holds no finished token set",
    "bench distill --preset tiny --shards nowhere": "nowhere",
    "bench train --preset tiny --shards x": "no use for --shards",
    "bench distill --preset tiny --data x": "no use for --data",
    "bench data --preset tiny --data x --shards y": "not both",
    "bench train --preset tiny --data x --documents 2": "--documents is for drawn tokens",
    "bench decode --preset tiny --documents 2": "no use for --documents",
    "bench teacher --preset tiny --microbatches 2": "no use for --microbatches",
    "bench decode --preset tiny --mesh fsdp=2": "no use for --mesh",
    "bench train --preset tiny --mesh fsdp=3": "does not fit 8 device(s)",
    "bench train --preset tiny --mesh nope=3": "no setting 'nope'",
    "bench train --preset tiny --rules nope": "rules='nope'",
    "bench train --preset tiny --pattern X": "attn_pattern='X'",
    "bench train --preset tiny --set nope=1": "no setting 'nope'",
    "bench teacher --preset tiny --against hf": "has no peer 'hf'; leave --against out",
    "bench train --preset tiny --against mine": "choose hf or hf-compile or tunix",
    "bench train --preset tiny --against hf --documents 2": "one document a sequence",
    "bench train --preset tiny --against hf --peer-python /none/python": "cannot be started",
    "bench train --preset tiny --sweep depth=1": "--sweep 'depth'",
    "bench train --preset tiny --sweep batch=8,8": "different whole numbers",
    "bench train --preset tiny --sweep batch=a": "different whole numbers",
    "bench train --preset tiny --sweep seq_len=32,65": "--seq-len 65 must",
    "bench train --preset tiny --plot x.png": "--plot draws a sweep",
}


@pytest.mark.parametrize("line", REFUSED)
def test_a_mistake_is_one_sentence(
    line: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(line.split())
    out, err = capsys.readouterr()
    assert end.value.code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert last.endswith(".")
    assert REFUSED[line] in last


def test_too_little_memory_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: BenchConfig) -> Any:
        raise run.jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setitem(run._KINDS, "train", full)
    with pytest.raises(ValueError, match="--batch 8 --seq-len 32 does not fit into the device's"):
        run.bench(configs("train", *TINY))


def test_a_sweep_runs_a_process_a_point_and_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: dict[str, Any]
) -> None:
    """Points are stood in for; their command lines are parsed as the verb would."""
    seen = []

    def stand_in(line: list[str]) -> dict[str, Any]:
        given = arguments.parse(line[3:])
        seen.append((given.what, given.seq_len, given.batch, given.batch_tokens, given.json))
        if given.seq_len == 64:
            return {"error": "it does not fit."}
        peer = {"name": "hf", "rows": trained["rows"]}
        return {"result": trained | {"peers": [peer]}}

    monkeypatch.setattr(sweep, "_run", stand_in)
    monkeypatch.chdir(tmp_path)
    line = ["train", "--preset", "tiny", "--batch-tokens", "256", "--sweep", "seq_len=16,32,64"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        cli.main(["bench", *line])
    assert seen == [("train", n, None, 256, True) for n in (16, 32, 64)]
    assert "seq_len=64: it does not fit." in out.getvalue()
    assert Path("bench-train-seq_len.png").read_bytes().startswith(b"\x89PNG")


def test_a_sweep_with_no_point_left_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_run", lambda _: {"error": "out of memory."})
    given = arguments.parse(["bench", "train", "--preset", "tiny", "--sweep", "batch=8,16"])
    with pytest.raises(ValueError, match="no point of the sweep could be measured: out of memory"):
        sweep.run_points(given, sweep.points(given), tmp_path / "x.png")


def test_a_point_is_a_process(capfd: pytest.CaptureFixture[str]) -> None:
    assert sweep._run(["sh", "-c", "echo '{\"a\": 1}'"]) == {"result": {"a": 1}}
    assert sweep._run(["sh", "-c", "echo error: no. >&2; exit 2"]) == {"error": "no."}


def test_tiny_fits_the_defaults() -> None:
    assert tiny().max_seq_len == 64
    assert [(c.seq_len, c.steps) for c in configs("decode", "--preset", "tiny")] == [(32, 32)] * 2
