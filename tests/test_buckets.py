"""Data that are read from a bucket and checkpoints that are kept there, against an emulator."""

import contextlib
import json
import shutil
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from command_line import BUILD, command, ended, write_inputs
from gcp_storage_emulator.handlers import objects
from gcp_storage_emulator.server import create_server

from gemma_jax.buckets import place
from gemma_jax.errors import UserError
from gemma_jax.files import locked, write_json


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """The address of an emulator, which all that this test starts will use."""
    download = objects.download

    def with_generation(request, response, storage, *arguments, **settings):
        """What TensorStore asks of a download, and the emulator leaves out."""
        download(request, response, storage, *arguments, **settings)
        with contextlib.suppress(Exception):  # there is no such object
            names = (request.params["bucket_name"], request.params["object_id"])
            response["x-goog-generation"] = storage.get_file_obj(*names)["generation"]

    monkeypatch.setattr(objects, "download", with_generation)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    emulator = create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    emulator.start()
    address = f"http://127.0.0.1:{port}"
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TENSORSTORE_GCS_HTTP_URL", address)
    monkeypatch.setenv("GOOGLE_AUTH_TOKEN_FOR_TESTING", "none")
    yield address
    emulator.stop()


def upload(address: str, folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            name = urllib.parse.quote(str(path), safe="")
            url = f"{address}/upload/storage/v1/b/bucket/o?uploadType=media&name={name}"
            urllib.request.urlopen(urllib.request.Request(url, path.read_bytes())).close()


def result(name: str) -> dict[str, Any]:
    return json.loads(Path(f"runs/{name}/result.json").read_text())


def succeeds(line: str) -> str:
    process = ended(command(*line.split()))
    assert process.returncode == 0, process.stderr
    return process.stdout + process.stderr


@pytest.mark.slow
def test_a_run_with_a_bucket(bucket, tmp_path, monkeypatch):
    """The numbers are those of a run on disk; it goes on from the bucket on an empty disk."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    succeeds(BUILD)
    succeeds("train exp.py")
    succeeds("teacher runs/tiny tokens shards --seq-len 32 --draws 8 --num-sequences 10")
    succeeds("train exp.py --arg name=local --set objective=Distill(shards='shards')")
    for name in ("tokens", "shards"):
        upload(bucket, Path(name))
        shutil.rmtree(name)
    line = (
        "train exp.py --arg name=remote --set data=gs://bucket/tokens "
        "--set objective=Distill(shards='gs://bucket/shards') "
        "--set train.checkpoints=gs://bucket/kept"
    )
    succeeds(line)
    assert not Path("runs/remote/checkpoints").exists()
    first, local = (
        json.loads(Path(f"runs/{n}/result.json").read_text()) for n in ("remote", "local")
    )
    names = ("loss", "bits_per_byte", "accuracy")
    assert [first[name] for name in names] == [local[name] for name in names]
    prompt = "--prompt a --max-new-tokens 3 --temperature 0 --json"
    said = [ended(command(*f"generate runs/{n} {prompt}".split())) for n in ("remote", "local")]
    assert said[0].stdout == said[1].stdout != ""

    shutil.rmtree("runs/remote")
    succeeds(line)
    again = result("remote")
    assert [again[name] for name in names] == [first[name] for name in names]
    assert [
        json.loads(x)["step"] for x in Path("runs/remote/metrics.jsonl").read_text().splitlines()
    ] == [4]

    moved = ended(command(*line.replace("kept", "elsewhere").split()))
    assert moved.returncode == 0  # a finished run needs nothing
    Path("runs/remote/result.json").unlink()
    moved = ended(command(*line.replace("kept", "elsewhere").split()))
    assert "has checkpoints in gs://bucket/kept/remote, and train.checkpoints=" in moved.stderr
    assert moved.returncode == 2


@pytest.mark.slow
def test_half_a_checkpoint_in_a_bucket_is_none(bucket, tmp_path, monkeypatch):
    """A copy that was cut off has no last file; a damaged one is moved aside."""
    monkeypatch.chdir(tmp_path)
    write_inputs(tmp_path)
    succeeds(BUILD)
    line = "train exp.py --set train.checkpoints=gs://bucket/kept"
    succeeds(line)
    for file in ("runs/tiny/result.json",):
        Path(file).unlink()
    url = f"{bucket}/storage/v1/b/bucket/o/" + urllib.parse.quote(
        "kept/tiny/4/commit_success.txt", safe=""
    )
    urllib.request.urlopen(urllib.request.Request(url, method="DELETE")).close()
    assert "going on from step 2" in succeeds(line)


def test_nothing_else_is_written_to_a_bucket(tmp_path):
    with pytest.raises(UserError, match="is in a bucket, where finished data are read"):
        write_json("gs://bucket/a.json", {})
    for path in ("s3://bucket/a", "gs:/bucket/a", "gs://"):
        with pytest.raises(UserError, match="gs://BUCKET/"):
            place(path)
    with (
        pytest.raises(UserError, match="is in a bucket, where finished data are read"),
        locked(Path("gs://bucket/a")),
    ):
        pass
