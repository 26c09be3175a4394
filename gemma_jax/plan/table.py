"""A plan as a person reads it."""

from collections.abc import Sequence
from typing import Any

from gemma_jax.plan.run import Plan, short

_GIB = 1 << 30
_WHAT = {
    "parameters": "parameters, float32",
    "optimizer": "optimizer",
    "average": "average of the parameters",
    "frozen": "frozen parameters",
    "batch": "batch",
    "cache": "KV cache",
    "state": "state of the sequences",
    "padding": "padding of these",
    "temporary": "activations, gradients, temporaries",
    "program": "program",
    "total": "in all",
}
_LINKS = {
    "compute": "matmuls at the peak",
    "memory": "memory traffic",
    "links": "links of the slice",
    "network": "network between slices",
}


def text(plan: Plan) -> str:
    return "\n".join([*_head(plan), "", *_memory(plan), "", *_work(plan), *_time(plan)])


def _head(plan: Plan) -> list[str]:
    lines = [
        f"{plan['experiment']}: {plan['step']} step on {plan['hardware']} ({plan['chips']} chips), "
        f"{short(plan)}",
        f"{plan['sequences']:,} sequences of {plan['seq_len']:,} tokens"
        f" ({plan['tokens_per_step']:,} tokens a step)",
    ]
    if plan["compiled"] is None:
        return [*lines, "by arithmetic alone, nothing compiled"]
    used = ", ".join(f"{name} {version}" for name, version in plan["versions"].items())
    return [
        *lines,
        f"compiled with {used}, not run; compilation {plan['compiled']['seconds']:.0f} s",
    ]


def _memory(plan: Plan) -> list[str]:
    memory = plan["memory"]
    rows = [(what, memory[name]) for name, what in _WHAT.items() if memory.get(name)]
    lines = ["memory of a chip, GiB"]
    lines += [f"  {what:<38}{size / _GIB:>10.3f}" for what, size in rows]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    if plan["compiled"] and plan["compiled"]["refused"]:
        verdict += " (the compiler refuses it)"
    return [*lines, f"  {'there is':<38}{memory['available'] / _GIB:>10.3f}   {verdict}"]


def _work(plan: Plan) -> list[str]:
    flops, sent, chips = plan["flops"], plan["bytes"], plan["chips"]
    traced = ", as traced" if plan["compiled"] else ""
    lines = [
        "a step, of each chip",
        f"  {'FLOPs that the model needs':<38}{flops['model'] / chips / 1e12:>10.3f} T",
        f"  {'FLOPs of its matmuls' + traced:<38}{flops['executed'] / chips / 1e12:>10.3f} T",
    ]
    if flops.get("xla_per_chip"):
        lines.append(f"  {'FLOPs by XLA, loops once':<38}{flops['xla_per_chip'] / 1e12:>10.3f} T")
    if sent["memory"] is not None:
        lines.append(f"  {'memory traffic':<38}{sent['memory'] / 1e9:>10.3f} GB")
        lines.append(f"  {'sent over links of the slice':<38}{sent['links'] / 1e9:>10.3f} GB")
        lines.append(f"  {'sent over the network':<38}{sent['network'] / 1e9:>10.3f} GB")
    kinds = sorted(sent["by_kind"].items(), key=lambda item: -item[1])
    return lines + [f"    {kind:<36}{size / 1e9:>10.3f} GB" for kind, size in kinds]


def _time(plan: Plan) -> list[str]:
    seconds = plan["seconds"]
    if seconds is None:
        return []
    lines = ["", "least time of a step, ms"]
    lines += [f"  {what:<38}{seconds[name] * 1e3:>10.2f}" for name, what in _LINKS.items()]
    lines += [
        f"  {'the longest of them':<38}{seconds['step'] * 1e3:>10.2f}   bound by {plan['bound']}",
        f"  {'one after another':<38}{seconds['one_after_another'] * 1e3:>10.2f}",
        "",
        f"at most {plan['tokens_per_s']:,.0f} tokens/s, {plan['tokens_per_day'] / 1e9:,.2f} "
        f"billion a day, {plan['mfu']:.0%} MFU; without overlap "
        f"{plan['tokens_per_s_one_after_another']:,.0f} tokens/s",
    ]
    if run := plan.get("run"):
        lines.append(f"{run['tokens']:,} tokens take at least {run['days']:,.2f} days")
    if shards := plan.get("shards"):
        line = f"shards: at most {shards['most_bytes_per_token']} bytes a token"
        if "tokens" in shards:
            line += f", {shards['most_bytes'] / 1e9:,.1f} GB for {shards['tokens']:,} tokens"
        lines.append(f"{line}, before compression")
    return lines


def ranking(plans: Sequence[Plan]) -> str:
    """A line a variant, the best first."""
    lines = [f"{'':<54}{'GiB':>8}{'':>6}{'ms':>10}{'no overlap':>12}{'tokens/s':>14}  bound by"]
    for one in plans:
        memory, seconds = one["memory"], one["seconds"] or {}
        lines.append(
            f"{short(one):<54}{memory['total'] / _GIB:>8.2f}{'' if memory['fits'] else ' over':>6}"
            + (
                f"{seconds['step'] * 1e3:>10.2f}{seconds['one_after_another'] * 1e3:>12.2f}"
                f"{one['tokens_per_s']:>14,.0f}  {one['bound']}"
                if seconds
                else f"{'refused':>10}"
            )
        )
    return "\n".join(lines)


def advice(tried: Sequence[Plan], fits: bool) -> str:
    if not tried:
        return (
            "nothing near it is estimated to fit: take more chips, or a smaller batch_tokens; "
            "`--search` shows the estimates."
        )
    lines = [ranking(tried)]
    if fits:
        lines.append(f"it fits with {settings(tried[-1])}")
    else:
        lines.append("none of these fits; `--search` compiles more of them.")
    return "\n".join(lines)


def settings(plan: Plan) -> str:
    """The settings of a variant as the command line takes them."""
    mesh: dict[str, Any] = plan["mesh"]
    place = "objective.shards.mesh" if plan["step"] == "teacher" else "mesh"
    parts = [f"--set {place}.{name}={value}" for name, value in mesh.items()]
    if plan["step"] == "train":
        parts += [
            f"--set model.remat={plan['remat']}",
            f"--set train.microbatches={plan['microbatches']}",
        ]
    return " ".join(parts)
