"""The verb `plan`: an experiment and hardware that is not here, to a table."""

import argparse
from typing import Any

from gemma_jax import report
from gemma_jax.errors import Interrupted, Preempted, Terminated, UserError


def plan(arguments: argparse.Namespace, experiment: Any) -> None:
    import jax

    from gemma_jax.plan import run, search, table
    from gemma_jax.plan.chips import parse_device, parse_topology
    from gemma_jax.plan.programs import Task

    if (arguments.topology is None) == (arguments.device is None):
        raise UserError("give either --topology, such as v5e:4x4, or --device, such as h100:8.")
    if arguments.device is not None and arguments.slices != 1:
        raise UserError("--slices is for --topology; --device counts all chips.")
    if arguments.count is not None and not arguments.search:
        raise UserError(f"--count {arguments.count} is for --search; give both or neither.")
    if arguments.rows is not None and arguments.step != "decode":
        raise UserError(f"--rows {arguments.rows} is for --step decode; give both or neither.")
    jax.config.update("jax_platforms", "cpu")  # whatever is here is left alone
    task = Task(arguments.step, experiment, arguments.rows or 1)
    try:
        if arguments.device is not None:
            hardware = parse_device(arguments.device)
            compiles = False
        else:
            hardware = parse_topology(arguments.topology, arguments.slices)
            compiles = True
        if arguments.search:
            plans = search.search(task, hardware, arguments.count or 4, compiles=compiles)
            best = f"\nthe first: {table.settings(plans[0])}" if plans else ""
            report.emit(arguments, plans, table.ranking(plans) + best)
            return
        found = run.plan(task, hardware) if compiles else run.estimate(task, hardware)
        text = table.text(found)
        if compiles and not found["memory"]["fits"]:
            tried, fits = search.mend(task, hardware)
            found["tried"] = tried
            text += "\n\n" + table.advice(tried, fits)
        report.emit(arguments, found, text)
    except KeyboardInterrupt as stop:
        kind = Preempted if isinstance(stop, Terminated) else Interrupted
        raise kind("stopped; what was compiled is kept, and not compiled again.") from None
