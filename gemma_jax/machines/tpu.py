"""Jobs on slices of Cloud TPUs: watched to their end, and started again after a preemption."""

import queue
import sys
import threading
import time
from collections.abc import Sequence

from gemma_jax.errors import INTERRUPTED_CODE, PREEMPTED_CODE, Interrupted, UserError
from gemma_jax.machines.job import Job
from gemma_jax.machines.slices import Slice, Worker

_ODD_POLLS = (
    15  # how often in a row a slice may answer in part, or go on without one of its workers
)
_LOG_LINES = 50  # of a worker that has failed


def run(place: Slice, job: Job, max_restarts: int = 100) -> int:
    """Runs a job on a slice to its end and returns how often it was started again.

    The slice is made where it is missing. A command that is running there already is watched.
    """
    if place.shell.dry_run:
        _rehearse(place, job)
        return 0
    for restarts in range(max_restarts + 1):
        place.wait()
        if place.spot and job.bucket is None:
            raise UserError(
                f"{place.name} is a spot slice, which may be taken away with its disks; give a "
                "place that stays: --bucket gs://..."
            )
        try:
            if (_is_running(place, job) or _begin(place, job)) and _watch(place, job):
                return restarts
        except KeyboardInterrupt:
            raise Interrupted(
                f"{place.name} is not watched any more. What was started there goes on: the same "
                f"command watches it again, `tpu stop {place.name} --zone {place.zone}` ends it."
            ) from None
        place.say("was preempted; the same command goes on")
        time.sleep(3 * place.poll_s)  # a machine that was given notice still answers for a while
    raise UserError(
        f"{place.name} was preempted {max_restarts + 1} times, and --max-restarts is "
        f"{max_restarts}; the same command goes on."
    )


def sweep(slices: Sequence[Slice], job: Job, points: Sequence[str], max_restarts: int) -> list[str]:
    """Runs each point of a sweep on one of the slices; returns the points that are not done.

    A slice takes the next point when it is done with one.
    """
    if slices[0].shell.dry_run:
        for place, point in zip(slices, points, strict=False):
            run(place, job.of_point(point), max_restarts)
        slices[0].shell.note(f"and so on for {len(points)} points: {', '.join(points)}")
        return []
    left: queue.SimpleQueue[str] = queue.SimpleQueue()
    for point in points:
        left.put(point)
    missing = set(points)

    def work(place: Slice) -> None:
        while not left.empty():
            try:
                point = left.get_nowait()
            except queue.Empty:  # another slice was faster
                return
            try:
                run(place, job.of_point(point), max_restarts)
                missing.remove(point)
            except (UserError, Interrupted) as error:
                print(f"{place.name}: point {point}: {error}", file=sys.stderr)

    # Daemons: Ctrl-C ends the watching here, and what runs there goes on.
    threads = [threading.Thread(target=work, args=(place,), daemon=True) for place in slices]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [point for point in points if point in missing]


def _is_running(place: Slice, job: Job) -> bool:
    busy = [worker for worker in place.ask_workers()[0] if worker.state == "running"]
    if any(worker.job != job.id for worker in busy):
        raise UserError(
            f"{place.name} is running another command, or other code; wait for it, or stop it: "
            f"tpu stop {place.name} --zone {place.zone}."
        )
    return bool(busy)


def _begin(place: Slice, job: Job) -> bool:
    """Sets the slice up and starts the job there; False where the slice was taken away meanwhile.

    A slice that has just become ACTIVE may refuse connections at first.
    """
    for tries_left in (2, 1, 0):
        try:
            place.set_up(job)
            place.start(job)
            return True
        except UserError:
            if place.state() == "PREEMPTED":
                return False
            if not tries_left:
                raise
        time.sleep(place.poll_s)
    raise AssertionError("the loop returns or raises")


def _watch(place: Slice, job: Job) -> bool:
    """Waits until the command has ended on all workers. True when it is done, False when it has to
    be started again; where one fails, the others are stopped and its log is shown."""
    odd = 0
    while True:
        answers, answer = place.ask_workers()
        workers = [worker for worker in answers if worker.job == job.id]
        complete = len(workers) >= place.count()
        place.print_log()
        over = complete and all(worker.state in ("ended", "lost") for worker in workers)
        again = any(w.state == "lost" or w.code == PREEMPTED_CODE for w in workers)
        failed = [w for w in workers if w.state == "ended" and w.code not in (0, PREEMPTED_CODE)]
        if over and not failed:
            return not again
        if complete and not again and not failed:
            odd = 0
        else:
            odd += 1
            state = place.state()
            if state is None:
                raise UserError(f"{place.name} was deleted while its command was running.")
            if state == "PREEMPTED" or (over and again):
                return False
            if failed and not again:
                _fail(place, min(failed, key=lambda worker: worker.time))
            if odd > _ODD_POLLS and again:  # the others wait for one that will not come back
                place.stop()
                return False
            if odd > _ODD_POLLS:
                said = (answer.err.strip().splitlines() or ["no error"])[-1]
                raise UserError(
                    f"{len(workers)} of the {place.count()} workers of {place.name} answer "
                    f"({said}); the command may be running still, and the same command watches it."
                )
        time.sleep(place.poll_s)


def _fail(place: Slice, worker: Worker) -> None:
    """Stops the others and tells of the worker that has failed first."""
    place.stop()
    if worker.code == INTERRUPTED_CODE:
        raise Interrupted(f"{place.name} was stopped; the same command goes on.")
    end = place.log(worker.index).splitlines()[-_LOG_LINES:]
    print("\n".join(f"worker {worker.index}| {line}" for line in end), file=sys.stderr)
    raise UserError(
        f"worker {worker.index} of {place.name} ended with exit code {worker.code}; the end of its "
        "log is above, and the others were stopped. Mend it and run the same command again."
    )


def _rehearse(place: Slice, job: Job) -> None:
    """The commands of a run that goes well, and those of a preemption."""
    note = place.shell.note
    note("is the slice there? If not, it is asked for, until it is ACTIVE")
    place.describe()
    if place.accelerator is not None:
        place.create()
    note("code, packages and the files of the bucket, then the command, on every worker")
    place.set_up(job)
    place.start(job)
    note(f"every {place.poll_s:g} s, until all have ended")
    place.ask_workers()
    place.print_log()
    note("where one fails")
    place.stop()
    note("after a preemption, and then all of it again")
    place.delete()
