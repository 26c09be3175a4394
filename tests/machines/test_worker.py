"""worker.sh itself, on this machine: the bucket is a folder, and launch.sh a stand-in."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

import gemma_jax.machines
from gemma_jax.errors import PREEMPTED_CODE

SCRIPT = Path(gemma_jax.machines.__file__).parent / "worker.sh"
# What gcloud storage does, with gs:// a folder beside it. `rsync` and `cp` leave what is newer.
GCLOUD = f"""#!{sys.executable} -SE
import os, re, shutil, sys
folder = os.path.dirname(os.path.realpath(__file__)) + "/"
with open(folder + "calls", "a") as calls:
    print(*sys.argv[1:], file=calls)
if os.path.exists(folder + "offline"):
    sys.exit(1)
verb, *paths = [word for word in sys.argv[2:] if not word.startswith("--")]
paths = [path.replace("gs://", folder) for path in paths]
if verb == "ls":
    sys.exit(not os.path.isdir(paths[0]))
if verb == "cat":
    folder = os.path.dirname(paths[0])
    for name in os.listdir(folder):
        sys.stdout.write(open(folder + "/" + name).read())
if verb == "cp":
    os.makedirs(os.path.dirname(paths[1]), exist_ok=True)
    shutil.copy(*paths)
if verb == "rsync":
    exclude = next(word[10:] for word in sys.argv if word.startswith("--exclude="))
    for at, _, names in os.walk(paths[0]):
        for name in names:
            here = os.path.join(at, name)
            relative = os.path.relpath(here, paths[0])
            there = os.path.join(paths[1], relative)
            if re.match(exclude, relative):
                continue
            if os.path.exists(there) and os.path.getmtime(there) >= os.path.getmtime(here):
                continue
            os.makedirs(os.path.dirname(there), exist_ok=True)
            shutil.copy2(here, there)
"""
CURL = """#!/bin/bash
case "${@: -1}" in
  *agent-worker-number) echo "${WORKER:-0}" ;;
  *worker-network-endpoints) echo "${ENDPOINTS:-10.0.0.1}" ;;
esac
"""
LAUNCH = """#!/bin/bash
if [[ $1 == --help ]]; then exit; fi
mkdir -p runs/x/checkpoints/20 runs/x/checkpoints/30.orbax-checkpoint-tmp
echo "$@ in $PWD with $GEMMA_JAX_EXTRA" | tee runs/x/said
touch runs/x/checkpoints/20/whole runs/x/checkpoints/30.orbax-checkpoint-tmp/half
trap 'exit 130' INT
trap 'exit 75' TERM
if [[ $1 == wait ]]; then exec PYTHON -c 'import signal, sys, time
for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
    signal.signal(number, lambda *_, code=code: sys.exit(code))
open("ready", "w").close()
while True:
    time.sleep(0.05)'; fi
exit "$2"
""".replace("PYTHON", sys.executable)


class Machine:
    """A worker's home, as tpu.py leaves it before it calls the script."""

    def __init__(self, folder: Path) -> None:
        self.job = folder / "home" / "gemma_jax_job"
        self.bin, self.bucket = folder / "bin", folder / "bin" / "bucket"
        self.env = os.environ | {"HOME": str(folder / "home"), "PATH": f"{self.bin}:/usr/bin:/bin"}
        room = self.job / "code" / "gemma_jax" / "machines"
        for path in (room, self.bin):
            path.mkdir(parents=True)
        self.script = shutil.copy(SCRIPT, room)
        programs = {"gcloud": GCLOUD, "curl": CURL, "uv": "#!/bin/sh\n"}
        programs |= {"sudo": '#!/bin/sh\necho sudo "$@" >>"$HOME/sudo"\ncat >>"$HOME/sudo"\n'}
        programs |= {"mountpoint": "#!/bin/sh\nexit 1\n", "mount.nfs": "", "exportfs": ""}
        for name, text in programs.items():
            self.write(self.bin / name, text)
        self.write(self.job / "code" / "launch.sh", LAUNCH)
        (folder / "mine.py").write_text("BASE = 1\n")
        with tarfile.open(self.job / "code.tar.gz", "w:gz") as archive:
            archive.add(folder / "mine.py", "mine.py")

    @staticmethod
    def write(path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def call(self, *words: str, **env: str) -> str:
        done = subprocess.run(
            ["bash", self.script, *words],
            env=self.env | env,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def status(self) -> list[str]:
        return self.call("status").split()

    def wait_for(self, state: str) -> list[str]:
        for _ in range(400):
            if (found := self.status())[2] == state:
                return found
            time.sleep(0.05)
        raise AssertionError(f"it is {found}, not {state}")

    def wait_for_file(self, path: Path) -> None:
        for _ in range(400):
            if path.exists():
                return
            time.sleep(0.05)
        raise AssertionError(f"no {path}")


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


@pytest.mark.parametrize("code", [0, 1, PREEMPTED_CODE, 128 + signal.SIGTERM])
def test_a_command_from_setup_to_the_bucket(machine: Machine, code: int) -> None:
    """The last is that of SIGTERM before the program listens: it is to be started again."""
    assert machine.status() == ["gemma-jax-worker", "0", "idle", "0", "0", "-"]
    machine.call("setup", "demo", "gs://bucket", "runs")
    machine.call("start", "abc", "train", str(code), "two words")
    ended = machine.wait_for("ended")
    assert (ended[3], ended[5]) == (str(code if code < 128 else PREEMPTED_CODE), "abc")
    work = machine.job / "work"
    said = f"train {code} two words in {work} with tpu\n"
    assert machine.call("log", "0") == said
    assert machine.call("log", "6") == said[6:]
    assert (work / "mine.py").read_text() == "BASE = 1\n"
    assert (machine.bucket / "runs/x/said").read_text() == said
    assert (machine.bucket / "runs/x/checkpoints/20/whole").exists()
    assert not (machine.bucket / "runs/x/checkpoints/30.orbax-checkpoint-tmp").exists()
    assert (machine.bucket / ".pushing/demo").read_text() == ""


def test_the_bucket_comes_back_without_halves(machine: Machine) -> None:
    """A checkpoint whose copying was cut off is not taken; nothing else is touched."""
    for step in ("10", "20"):
        (machine.bucket / "runs/x/checkpoints" / step).mkdir(parents=True)
        (machine.bucket / "runs/x/checkpoints" / step / "part").write_text(step)
    (machine.bucket / ".pushing").mkdir()
    (machine.bucket / ".pushing/other").write_text("runs/x/checkpoints/20\n")
    (machine.bucket / ".pushing/bad").write_text("runs\n")
    machine.call("setup", "demo", "gs://bucket", "runs")
    found = machine.job / "work/runs/x/checkpoints"
    assert sorted(path.name for path in found.iterdir()) == ["10"]


def test_what_is_being_copied_is_named_until_it_is_there(machine: Machine) -> None:
    """The cloud goes away while the command runs: that is no success, and the halves are known."""
    machine.call("setup", "demo", "gs://bucket", "runs")
    (machine.bin / "offline").touch()
    machine.call("start", "abc", "train", "0")
    assert machine.wait_for("ended")[3] == "74"
    (machine.bin / "offline").unlink()
    assert not (machine.bucket / "runs").exists()
    assert (machine.job / "pushing").read_text() == "runs/x/checkpoints/20\n"


def test_copies_are_made_while_it_runs_and_stop_is_ctrl_c(machine: Machine) -> None:
    machine.call("setup", "demo", "gs://bucket", "runs")
    machine.call("start", "abc", "wait", GEMMA_JAX_PUSH_S="0.1")
    machine.wait_for_file(machine.bucket / "runs/x/checkpoints/20/whole")
    machine.wait_for_file(machine.job / "work/ready")
    assert machine.status()[2] == "running"
    refused = subprocess.run(
        ["bash", machine.script, "start", "def", "x"], env=machine.env, capture_output=True
    )
    assert refused.returncode == 3
    machine.call("stop")
    assert machine.wait_for("ended")[3] == "130"


def test_a_notice_of_preemption_lets_the_program_save(machine: Machine) -> None:
    """SIGTERM comes to every process of the machine, once."""
    machine.call("setup", "demo", "-", "runs")
    machine.call("start", "abc", "wait")
    machine.wait_for_file(machine.job / "work/ready")
    os.kill(int((machine.job / "pid").read_text()), signal.SIGTERM)
    os.kill(int((machine.job / "program").read_text()), signal.SIGTERM)
    assert machine.wait_for("ended")[3] == str(PREEMPTED_CODE)


def test_a_worker_that_has_started_again_has_lost_its_command(machine: Machine) -> None:
    machine.call("setup", "demo", "-", "runs")
    machine.call("start", "abc", "wait")
    machine.wait_for_file(machine.job / "program")
    os.killpg(int((machine.job / "pid").read_text()), signal.SIGKILL)
    os.killpg(int((machine.job / "program").read_text()), signal.SIGKILL)
    assert machine.wait_for("lost")[5] == "abc"


def test_workers_share_the_folder_of_the_first(machine: Machine) -> None:
    """Both forms in which Cloud TPU names the workers."""
    machine.call("setup", "demo", "-", "runs", ENDPOINTS="a:0:10.0.0.1,b:1:10.0.0.2")
    work, home = machine.job / "work", machine.job.parent
    options = f"rw,sync,no_subtree_check,all_squash,anonuid={os.getuid()},anongid={os.getgid()}"
    assert f"{work} 10.0.0.2({options})" in (home / "sudo").read_text().splitlines()
    machine.call("setup", "demo", "-", "runs", ENDPOINTS="first,second", WORKER="1")
    mount = f"sudo mount -t nfs -o hard,lookupcache=positive first:{work} {work}"
    assert mount in (home / "sudo").read_text().splitlines()
