"""Slices of Cloud TPUs against a stand-in of gcloud: exact commands, failures, preemptions."""

import json
import re
from typing import Any

import pytest

from gemma_jax.errors import INTERRUPTED_CODE, PREEMPTED_CODE
from gemma_jax.machines.accelerators import count_workers

PLACE = "--zone=z --quiet"
SSH = f"gcloud compute tpus tpu-vm ssh demo --worker={{}} --command={{}} {PLACE}"
KEYS = " --strict-host-key-checking=no"
SCRIPT = "bash gemma_jax_job/code/gemma_jax/machines/worker.sh"
RUN = "tpu run demo --zone z --type v5litepod-16 --bucket gs://mine/jobs --poll-s 0"
NOT_FOUND = (1, "", "ERROR: (gcloud) NOT_FOUND: Resource was not found\n")
NODE = {"acceleratorType": "v5litepod-16", "runtimeVersion": "v2-alpha-tpuv5-lite"}


def slice_(state: str, **more: Any) -> str:
    return json.dumps({"state": {"state": state}, "tpu": {"nodeSpec": [{"node": NODE}]}, **more})


def says(job: str, *states: str) -> str:
    """What workers answer; a state is "running 0 0", for example."""
    return "".join(f"gemma-jax-worker {w} {state} {job}\n" for w, state in enumerate(states))


@pytest.fixture
def job(cloud, run) -> str:
    """The word by which the command of RUN is known."""
    code, out, _ = run(f"{RUN} --dry-run -- train mine.py")
    assert code == 0
    return re.search(r"worker\.sh start (\w+) ", out)[1]


def rules(job: str, *polls: str, **more: Any) -> dict[str, Any]:
    """A slice that is there, whose workers answer so: before the start, then poll by poll."""
    return {
        **more,
        "queued-resources describe": [slice_("ACTIVE")],
        "tpu-vm describe": ["READY\n"],
        "worker.sh status": [says("-", *["idle 0 0"] * 4), *polls],
        r"--worker=0 .*worker.sh log": ["first line\n", ""],
    }


DONE = ["ended 0 100"] * 4


def test_a_run_from_nothing_to_its_end(cloud, run, job) -> None:
    """The slice is asked for and waited for, every worker is set up and started, and watched."""
    cloud.answer(
        rules(job, says(job, *["running 0 0"] * 4), says(job, *DONE))
        | {"queued-resources describe": [NOT_FOUND, slice_("PROVISIONING"), slice_("ACTIVE")]}
    )
    code, out, err = run(f"{RUN} --spot --json -- train mine.py --set name=x")
    assert code == 2  # the stand-in's workers tell of another command
    cloud.folder.joinpath("calls").unlink()

    code, out, err = run(f"{RUN} --spot --json -- train mine.py")
    assert (code, json.loads(out)) == (0, {"name": "demo", "restarts": 0}), err
    assert "first line\n" in err
    lines = [" ".join(argv) for argv in cloud.calls]
    archive = re.search(r"[0-9a-f]{16}\.tar\.gz", " ".join(lines))[0]
    queued = "gcloud compute tpus queued-resources {} demo --zone=z --quiet"
    describe = queued.format("describe") + " --format=json"
    node = f"gcloud compute tpus tpu-vm describe demo --format=value(state) {PLACE}"
    status = SSH.format("all", f"{SCRIPT} status") + KEYS
    setup = (
        "mkdir -p gemma_jax_job/code && cd gemma_jax_job && gcloud storage cp "
        f"gs://mine/jobs/.code/{archive} code.tar.gz --quiet && find code -mindepth 1 -maxdepth 1 "
        "! -name .venv -exec rm -rf {} + && tar -xzf code.tar.gz -C code && bash "
        "code/gemma_jax/machines/worker.sh setup demo gs://mine/jobs runs"
    )
    assert lines == [
        describe,
        f"{queued.format('create')} --node-id=demo --accelerator-type=v5litepod-16 "
        "--runtime-version=v2-alpha-tpuv5-lite --spot",
        describe,
        describe,
        node,
        status,
        lines[6],
        SSH.format("all", setup) + KEYS,
        SSH.format("all", f"{SCRIPT} start {job} train mine.py --distributed") + KEYS,
        status,
        SSH.format("0", f"{SCRIPT} log 0") + KEYS,
        status,
        SSH.format("0", f"{SCRIPT} log 11") + KEYS,
    ]
    assert re.fullmatch(
        rf"gcloud storage cp \S+/{archive} gs://mine/jobs/\.code/{archive} --quiet", lines[6]
    )


def test_a_preempted_slice_is_made_again_and_goes_on(cloud, run, job) -> None:
    """The slice is suspended under the running command; all of it is done again."""
    active = slice_("ACTIVE", spot={})
    cloud.answer(
        rules(job, (1, "", "no route to host"), says("-", *["idle 0 0"] * 4), says(job, *DONE))
        | {"queued-resources describe": [active, slice_("SUSPENDING"), slice_("SUSPENDED"), active]}
    )
    code, _, err = run("tpu run demo --zone z --bucket gs://mine/jobs --poll-s 0 -- train mine.py")
    assert code == 0, err
    begin = ["cp", "setup", "start", "status", "log"]
    assert cloud.verbs() == [
        *("describe", "tpu-vm describe", "status", *begin, "describe"),
        *("describe", "delete", "create"),  # of the same kind, though no --type was given
        *("describe", "tpu-vm describe", "status", *begin),
    ]
    made = next(argv for argv in cloud.calls if "create" in argv)
    assert {"--spot", "--accelerator-type=v5litepod-16"} <= set(made)


@pytest.mark.parametrize("lost", [f"ended {PREEMPTED_CODE} 100", "lost 0 0"])
def test_a_command_that_asks_for_it_is_started_again(cloud, run, job, lost) -> None:
    """Also where the slice has stayed, and where one worker was lost and the others failed then."""
    crashed = ["ended 1 90"] * 3
    cloud.answer(
        rules(job, says(job, lost, *crashed), says("-", *["idle 0 0"] * 4), says(job, *DONE))
    )
    code, out, err = run(f"{RUN} --json -- train mine.py")
    assert (code, json.loads(out)["restarts"]) == (0, 1), err
    assert cloud.verbs().count("start") == 2
    assert "delete" not in cloud.verbs()


def test_preemptions_have_a_limit(cloud, run, job) -> None:
    always = says(job, *[f"ended {PREEMPTED_CODE} 100"] * 4)
    cloud.answer(rules(job, always))
    code, _, err = run(f"{RUN} --max-restarts 2 -- train mine.py")
    assert code == 2
    assert "preempted 3 times" in err
    assert cloud.verbs().count("start") == 3


def test_a_worker_that_fails_ends_all_and_shows_its_log(cloud, run, job) -> None:
    """Of several, the one that was first: the others fail because of it."""
    states = ["running 0 0", "ended 1 200", "ended 3 100", "ended 1 300"]
    log = "".join(f"line {number}\n" for number in range(80))
    cloud.answer({"--worker=2 .*log": [log]} | rules(job, says(job, *states)))
    code, _, err = run(f"{RUN} -- train mine.py")
    assert code == 2
    assert "worker 2| line 79\nerror: worker 2 of demo ended with exit code 3" in err
    assert "line 30" in err
    assert "line 29\n" not in err
    assert cloud.verbs()[-2:] == ["stop", "log"]


def test_a_command_that_was_stopped_is_no_failure(cloud, run, job) -> None:
    cloud.answer(rules(job, says(job, *[f"ended {INTERRUPTED_CODE} 100"] * 4)))
    code, _, err = run(f"{RUN} -- train mine.py")
    assert code == INTERRUPTED_CODE
    assert "demo was stopped; the same command goes on." in err


def test_a_running_command_is_watched_and_another_one_refused(cloud, run, job) -> None:
    busy = says(job, *["running 0 0"] * 4)
    cloud.answer(rules(job) | {"worker.sh status": [busy, busy, says(job, *DONE)]})
    code, out, err = run(f"{RUN} -- train mine.py")
    assert code == 0, err
    assert out.startswith("done; see gs://mine/jobs/runs.")
    assert out.endswith("  tpu delete demo --zone z\n")
    assert "start" not in cloud.verbs()
    cloud.answer(rules(job) | {"worker.sh status": [busy]})
    code, _, err = run(f"{RUN} -- train mine.py --set name=other")
    assert code == 2
    assert "is running another command, or other code" in err


def test_workers_that_do_not_answer(cloud, run, job) -> None:
    """Once is nothing; for long, it is said, and the command is left alone."""
    silent = (255, says(job, "running 0 0"), "timed out\n")
    cloud.answer(rules(job, silent, silent, says(job, *DONE)))
    assert run(f"{RUN} -- train mine.py")[0] == 0
    cloud.answer(rules(job) | {"worker.sh status": [says("-", "idle 0 0"), silent]})
    code, _, err = run(f"{RUN} -- train mine.py")
    assert code == 2
    assert "1 of the 4 workers of demo answer (timed out)" in err
    assert cloud.verbs()[-1] != "stop"


@pytest.mark.parametrize(
    ("described", "said"),
    [
        (NOT_FOUND, "demo was deleted while its command was running"),
        (
            json.dumps(
                {"state": {"state": "FAILED", "failedData": {"error": {"message": "no quota."}}}}
            ),
            "Cloud TPU cannot give demo (no quota)",
        ),
        ((1, "", "WARNING: x\nERROR: PERMISSION_DENIED\n"), "failed: ERROR: PERMISSION_DENIED."),
    ],
)
def test_what_cloud_tpu_refuses_is_one_sentence(cloud, run, job, described, said) -> None:
    cloud.answer(
        rules(job, says(job, "running 0 0"))
        | {"queued-resources describe": [slice_("ACTIVE"), described]}
    )
    code, _, err = run(f"{RUN} -- train mine.py")
    assert code == 2
    assert said in err.splitlines()[-1]


def test_ctrl_c_leaves_the_command_alone(cloud, run, job, monkeypatch) -> None:
    def ctrl_c(_: float) -> None:
        raise KeyboardInterrupt

    cloud.answer(rules(job, says(job, *["running 0 0"] * 4)))
    monkeypatch.setattr("time.sleep", ctrl_c)
    code, _, err = run(f"{RUN} -- train mine.py")
    assert code == INTERRUPTED_CODE
    assert "`tpu stop demo --zone z` ends it" in err
    assert cloud.verbs()[-1] == "log"


def test_setting_up_is_tried_again(cloud, run, job) -> None:
    """Machines that are new refuse connections for a while."""
    refused = (1, "", "ssh: connect to host: Connection refused\n")
    cloud.answer({"worker.sh setup": [refused, ""]} | rules(job, says(job, *DONE)))
    assert run(f"{RUN} -- train mine.py")[0] == 0
    cloud.answer({"worker.sh setup": [refused]} | rules(job))
    code, _, err = run(f"{RUN} -- train mine.py")
    assert code == 2
    assert "setting up the workers of demo failed: ssh: connect" in err


def test_a_sweep_is_a_point_a_job(cloud, run, job, monkeypatch) -> None:
    """Three points on one slice; the one that fails is named, the others are run all the same."""
    monkeypatch.setattr("gemma_jax.cli_machines._points", lambda command: ["a", "b", "c"])
    line = RUN.replace("run", "sweep", 1)
    _, out, _ = run(f"{line} --slices 3 --dry-run -- mine.py --seeds 0,1")
    command = "sweep mine.py --seeds 0,1 --distributed"
    starts = re.findall(rf"ssh (demo-\d) .*start (\w+) {command} --only (\w)'", out)
    assert [(name, point) for name, _, point in starts] == [
        *(("demo-0", "a"), ("demo-1", "b"), ("demo-2", "c")),
    ]
    words = {point: word for _, word, point in starts}
    idle = says("-", *["idle 0 0"] * 4)
    answers = [idle, says(words["a"], *DONE), idle, says(words["b"], *["ended 1 5"] * 4)]
    cloud.answer(
        rules(job) | {"worker.sh status": [*answers, idle, says(words["c"], *DONE)]},
    )
    code, _, err = run(f"{line} -- mine.py --seeds 0,1")
    assert code == 2
    assert "demo-0: point b: worker 0 of demo-0 ended with exit code 1" in err
    assert err.endswith("error: these points failed, see above: b.\n")
    assert cloud.verbs().count("start") == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tpu run demo --type v5litepod-16 -- train mine.py", "required: --zone"),
        ("tpu run demo --zone z --type v5e-16 -- train mine.py", "calls it v5litepod-16"),
        ("tpu create demo --zone z --type h100-8", "no type of TPU slice"),
        ("tpu create demo --zone z --type v5litepod-17", "no slice has that many chips"),
        ("tpu create demo --zone z --type v5p-9", "no slice has that many chips"),
        ("tpu create demo --zone z --type v6e-3", "no slice has that many chips"),
        ("tpu create demo --zone Z --type v6e-8", "--zone 'Z' cannot name a zone"),
        ("tpu run demo --zone z --type v6e-8 --bucket gs://MINE -- train mine.py", "small letters"),
        ("tpu create demo --zone z", "say what to ask for, such as --type v5litepod-16"),
        ("tpu create De_mo --zone z --type v6e-8", "'De_mo' cannot name a slice"),
        ("tpu run demo --zone z --type v6e-8 --bucket mine -- train mine.py", "--bucket mine must"),
        ("tpu run demo --zone z --type v6e-8 --keep /x -- train mine.py", "--keep /x must be"),
        ("tpu run demo --zone z --type v6e-8 -- trian mine.py", "'trian'"),
        ("tpu run demo --zone z --type v6e-8 -- train mine.py --nope", "unrecognized"),
        ("tpu run demo --zone z --type v6e-8 -- tpu stop demo --zone z", "hands a command on"),
        ("tpu run demo --zone z --type v6e-8 -- train nowhere.py", "nowhere.py does not exist"),
        ("tpu run demo --zone z --type v6e-8 -- train ignored.py", "would not reach the machines"),
        ("tpu run demo --zone z --type v6e-8", "required: command"),
    ],
)
def test_a_mistake_is_one_sentence_and_asks_for_nothing(cloud, run, line, said) -> None:
    code, out, err = run(line)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert said in err
    assert cloud.calls == []


def test_a_spot_slice_needs_a_bucket(cloud, run, job) -> None:
    cloud.answer(rules(job))
    code, _, err = run("tpu run demo --zone z --type v5litepod-16 --spot -- train mine.py")
    assert code == 2
    assert "taken away with its disks" in err
    assert "setup" not in cloud.verbs()


def test_gcloud_that_is_missing(cloud, run) -> None:
    (cloud.folder / "gcloud").unlink()
    code, _, err = run("tpu status demo --zone z")
    assert code == 2
    assert err.startswith("error: gcloud is not on this machine; install the Google Cloud CLI")
    code, out, _ = run("tpu delete demo --zone z --project p --dry-run")
    assert code == 0
    assert out == (
        "gcloud compute tpus queued-resources delete demo --zone=z --project=p --quiet --force\n"
    )


def test_a_dry_run_prints_the_commands_and_runs_none(cloud, run) -> None:
    for action in ("create", "status", "stop", "delete", "logs"):
        more = " --type v6e-8" if action == "create" else ""
        code, out, _ = run(f"tpu {action} demo --zone z{more} --dry-run")
        assert code == 0
        assert all(line.startswith(("gcloud ", "#")) for line in out.splitlines()), out
    code, out, _ = run(f"{RUN} --spot --dry-run -- train mine.py")
    assert code == 0
    words = ("describe demo", "create demo", "storage cp", "worker.sh setup", "worker.sh start")
    places = [out.index(word) for word in (*words, "worker.sh status", "worker.sh stop", "delete")]
    assert places == sorted(places)
    assert cloud.calls == []


def test_status_logs_and_stop(cloud, run, job) -> None:
    cloud.answer(
        rules(job)
        | {"worker.sh status": [says(job, "running 0 0", "ended 1 5")], "=1 .*log": ["x\n"]}
    )
    _, out, _ = run("tpu status demo --zone z")
    assert out.splitlines() == [
        "demo: ACTIVE",
        "worker 0: running",
        "worker 1: ended with exit code 1",
    ]
    assert run("tpu logs demo --zone z --worker 1")[1] == "x\n"
    assert run("tpu stop demo --zone z")[0] == 0
    assert cloud.verbs()[-1] == "stop"
    cloud.answer({"describe": [NOT_FOUND]})
    assert run("tpu status demo --zone z")[1] == "demo: there is no such slice\n"


def test_workers_of_a_type() -> None:
    """Cloud TPU's pages of v5e, v6e, v5p and v4 say how many machines each type has."""
    known = {"v5litepod-1": 1, "v5litepod-8": 1, "v5litepod-16": 4, "v5litepod-256": 64}
    known |= {"v6e-8": 1, "v6e-16": 4, "v5p-8": 1, "v5p-64": 8, "v4-32": 4}
    assert {name: count_workers(name) for name in known} == known
