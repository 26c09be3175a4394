"""launch.sh in a folder of its own, with an environment that looks installed: no network."""

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
INPUTS = ("launch.sh", "pyproject.toml", "constraints.txt", ".python-version")
TOOLS = (
    *("bash", "cp", "dirname", "flock", "grep", "mkdir", "mv", "paste", "readlink", "rm", "sed"),
    *("sh", "sleep", "sort", "timeout", "tr"),
)
FAKE_PYTHON = """#!/bin/sh
# Stands for the environment's Python: records an installation, reports any other call.
case "$*" in
  *"pip --version"*) exit 0 ;;
  *" install "*) echo "$@" >>"$LAUNCH_LOG"; sleep "${PIP_SLEEP:-0}"; exit "${PIP_EXIT:-0}" ;;
esac
for argument; do printf '<%s>' "$argument"; done
pwd
exit "${FAKE_EXIT:-0}"
"""
# What the found Python does for `-c ...` (may it be used?) and for `-m venv FOLDER`.
FAKE_BASE = """#!/bin/sh
if [ "$1" = -c ]; then echo "$0"; exit 0; fi
mkdir -p "$3/bin" && cp "{fake}" "$3/bin/python"
"""


class Sandbox:
    """A copy of what launch.sh reads, and a PATH on which only stand-ins answer."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a clone"
        self.bin = folder / "bin"
        self.elsewhere = folder / "else where"
        self.log = folder / "installations"
        for path in (self.root, self.bin, self.elsewhere):
            path.mkdir()
        for name in INPUTS:
            shutil.copy(ROOT / name, self.root / name)
        for tool in TOOLS:
            if found := shutil.which(tool):
                (self.bin / tool).symlink_to(found)
        fake = folder / "fake_python"
        self.command(fake, FAKE_PYTHON)
        self.command(self.bin / "python3.12", FAKE_BASE.format(fake=fake))

    @staticmethod
    def command(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *args: str, **env: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "launch.sh", *args],
            cwd=self.elsewhere,
            env={"PATH": str(self.bin), "HOME": str(self.bin), "LAUNCH_LOG": str(self.log), **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # so that a test can end it with all its children
        )

    def run(self, *args: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*args, **env)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def installations(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def sandbox(tmp_path: Path) -> Sandbox:
    return Sandbox(tmp_path)


def test_everything_is_passed_on(sandbox: Sandbox) -> None:
    code, out, err = sandbox.run("train", "two words", "--set", "a=b", FAKE_EXIT="7")
    assert code == 7
    assert out == f"<-P><-m><gemma_jax><train><two words><--set><a=b>{sandbox.elsewhere}\n"
    assert err.count("\n") == 1
    assert "installing gemma_jax[cpu]" in err


def test_tests_run_in_the_repository_with_the_dev_extra(sandbox: Sandbox) -> None:
    code, out, _ = sandbox.run("test", "-k", "a and b")
    assert code == 0
    assert out == f"<-m><pytest><-k><a and b>{sandbox.root}\n"
    assert sandbox.installations[0].endswith(f"-e {sandbox.root}[cpu,dev]")
    assert f"-c {sandbox.root}/constraints.txt" in sandbox.installations[0]


def test_clients_are_installed_before_their_tests(sandbox: Sandbox) -> None:
    code, out, _ = sandbox.run("test", "clients", "-k", "mlx")
    assert code == 0
    assert out == (
        f"<tests/clients/install.py>{sandbox.root}\n"
        f"<-m><pytest><-m><clients><-rs><-k><mlx>{sandbox.root}\n"
    )


def test_installs_once(sandbox: Sandbox) -> None:
    for args in (["eval"], ["eval"], ["test"], ["test"], ["eval"]):
        sandbox.run(*args)
    assert [line.rpartition("[")[2] for line in sandbox.installations] == ["cpu]", "cpu,dev]"]


def test_second_start_is_quick(sandbox: Sandbox) -> None:
    sandbox.run("eval")
    began = time.monotonic()
    code, _, err = sandbox.run("eval")
    assert (code, err) == (0, "")
    assert time.monotonic() - began < 3  # about 0.01 s where nothing else runs


@pytest.mark.parametrize("changed", INPUTS[1:])
def test_a_change_of_what_is_installed_installs_again(sandbox: Sandbox, changed: str) -> None:
    sandbox.run("eval")
    path = sandbox.root / changed
    text = path.read_text()
    path.write_text(text.replace("jax>=", "jax >=") + ("" if "jax>=" in text else "\n# new"))
    sandbox.run("eval")
    assert len(sandbox.installations) == 2


def test_settings_of_tools_do_not_install_again(sandbox: Sandbox) -> None:
    sandbox.run("eval")
    path = sandbox.root / "pyproject.toml"
    path.write_text(path.read_text().replace("line-length = 100", "line-length = 99"))
    assert sandbox.run("eval")[2] == ""


def test_interrupted_installation_starts_over(sandbox: Sandbox) -> None:
    process = sandbox.start("eval", PIP_SLEEP="60")
    while not sandbox.installations:
        assert process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    half = sandbox.root / ".venv" / "half"
    half.touch()
    code, _, err = sandbox.run("eval")
    assert code == 0
    assert len(sandbox.installations) == 2
    assert not half.exists()
    assert "installing" in err


def test_failed_installation_is_two_and_no_environment(sandbox: Sandbox) -> None:
    code, out, err = sandbox.run("eval", PIP_EXIT="1")
    assert (code, out) == (2, "")
    assert "the installation failed" in err
    assert sandbox.run("eval")[0] == 0
    assert len(sandbox.installations) == 2


def test_failed_update_keeps_what_was_there(sandbox: Sandbox) -> None:
    sandbox.run("eval")
    path = sandbox.root / "constraints.txt"
    old = path.read_text()
    path.write_text(old + "nothing==0\n")
    assert sandbox.run("eval", PIP_EXIT="1")[0] == 2
    path.write_text(old)
    assert sandbox.run("eval")[2] == ""


@pytest.mark.skipif(shutil.which("flock") is None, reason="launch.sh locks with flock")
def test_two_at_once_install_once(sandbox: Sandbox) -> None:
    processes = [sandbox.start("eval", PIP_SLEEP="0.5") for _ in range(2)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(sandbox.installations) == 1
    assert any("waiting for another launch.sh" in err for err in errors)


def test_moved_folder_is_installed_anew(sandbox: Sandbox) -> None:
    sandbox.run("eval")
    sandbox.root = sandbox.root.rename(sandbox.root.with_name("moved"))
    sandbox.run("eval")
    assert sandbox.installations[-1].endswith(f"{sandbox.root}[cpu]")


def test_a_driver_that_answers_means_cuda(sandbox: Sandbox) -> None:
    sandbox.command(sandbox.bin / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    sandbox.run("eval")
    sandbox.command(sandbox.bin / "nvidia-smi", "#!/bin/sh\nexit 0\n")
    sandbox.run("eval")
    extras = [line.rpartition("[")[2] for line in sandbox.installations]
    assert extras == ["cpu]", "cpu,cuda]"]


def test_extras_by_hand(sandbox: Sandbox) -> None:
    sandbox.run("eval", GEMMA_JAX_EXTRA="tpu, wandb")
    assert sandbox.installations[0].endswith("[tpu,wandb]")
    code, _, err = sandbox.run("eval", GEMMA_JAX_EXTRA="gpu")
    assert code == 2
    assert "'gpu'" in err


def test_no_python_is_one_sentence(sandbox: Sandbox) -> None:
    (sandbox.bin / "python3.12").unlink()
    code, out, err = sandbox.run("eval")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert "no Python 3.12 or newer" in err


def test_too_old_a_python_is_passed_over(sandbox: Sandbox) -> None:
    os.rename(sandbox.bin / "python3.12", sandbox.bin / "python3")
    sandbox.command(sandbox.bin / "python3.12", "#!/bin/sh\nexit 1\n")
    assert sandbox.run("eval")[0] == 0


def test_works_through_a_link(sandbox: Sandbox) -> None:
    link = sandbox.bin / "gemma"
    link.symlink_to(sandbox.root / "launch.sh")
    environment = {"PATH": str(sandbox.bin), "HOME": str(sandbox.bin), "LAUNCH_LOG": os.devnull}
    subprocess.run([link, "eval"], env=environment, check=True, capture_output=True)
    assert (sandbox.root / ".venv" / "installed").exists()
