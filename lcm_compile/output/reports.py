"""What plans, bundles and parity figures look like, to people and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lcm_compile.builder.estimate import Estimate
from lcm_compile.builder.plan import Plan
from lcm_compile.bundles.manifest import Parity, StageFile
from lcm_compile.output.console import print_table, size_text


def print_plan(plan: Plan, cost: Estimate | None) -> None:
    """`cost` is what building it would take; None where that is not known."""
    export = plan.export
    made = (
        []
        if export is None
        else [
            ("base", f"{export.checkpoint.location} ({export.checkpoint.architecture})"),
            ("vae", export.checkpoint.components["vae"].location),
            *((f"lossy {stage}", why) for stage, why in export.lossy.items()),
            *((f"{p.role} LoRA", f"{p.path} × {p.spec.effective}") for p in export.loras),
            ("shape", str(export.shape)),
            ("rewrites", ", ".join(export.spec.rewrites) or "none"),
            *((("graphs", "one of the whole picture"),) if export.spec.whole_loop else ()),
            *((f"precision of {stage}", precision) for stage, precision in export.precisions.items()),
        ]
    )
    rows = [
        *made,
        ("target", f"{plan.target.name} ({plan.target.description})"),
        ("backend", "\n".join((plan.backend_name, *(f"not {reason}" for reason in plan.passed_over)))),
        *(() if cost is None else estimate_rows(cost)),
        ("bundle", str(plan.folder)),
        ("hit" if plan.hit else "miss", "\n".join(plan.reasons)),
    ]
    print_table(("", "plan"), rows)


def estimate_rows(cost: Estimate) -> list[tuple[str, str]]:
    rows = [("disk", f"{size_text(cost.bundle_bytes)}, and {size_text(cost.disk_bytes)} while it is built")]
    time = f"about {time_text(cost.seconds)} on 2 cores"
    return [*rows, ("memory", size_text(cost.memory_bytes)), ("time", time)]


def time_text(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def parity_line(figures: Mapping[str, Parity]) -> str:
    told = ", ".join(f"{name} {figure.db:.0f} dB" for name, figure in figures.items())
    checked = sorted({figure.checked for figure in figures.values()})
    return f"parity with torch ({', '.join(checked)}): {told}"


def print_parity(figures: Mapping[str, Parity]) -> None:
    rows = [
        (name, f"{f.db:.1f}", f"{f.floor:g}", f.checked, "ok" if f.passed else "MISS")
        for name, f in figures.items()
    ]
    print_table(("stage", "dB", "needs", "checked", ""), rows)


def print_description(name: str, description: Mapping[str, Any]) -> None:
    print_table(("", name), [(key, told(value)) for key, value in description.items() if value != {}])


def told(value: Any) -> str:
    """A value for a person: dictionaries, and lists of them, one item a line."""
    if isinstance(value, dict):
        return "\n".join(f"{k}: {told(v)}".replace("\n", "\n  ") for k, v in value.items())
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "\n".join(", ".join(f"{k} {told(v)}" for k, v in item.items() if v != {}) for item in value)
    if isinstance(value, list):
        return ", ".join(map(told, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_lora(data: Mapping[str, Any]) -> None:
    """What a LoRA is, then the blocks that it changes."""

    def shown(name: str) -> str:
        return ", ".join(
            value if n == data["modules"] else f"{value} ({n})" for value, n in data[name].items()
        )

    matched = f"{data['matched_keys']} of {data['keys']}"
    rows = [
        ("LoRA", data["lora"]),
        ("kind", f"{shown('kinds')}, in the layout of {data['layout']}"),
        ("rank", shown("ranks") or "none"),
        ("alpha", shown("alphas") or "the rank"),
        ("size", f"{data['parameters']:,} parameters for {data['modules']} modules"),
        ("made for", data["made_for"]),
        ("keys", f"{matched} match {data['matched_to']}" if data["matched_to"] else "match no known base"),
        *((f"{name} keys", found) for name in ("unmatched", "misshapen") if (found := listed(data[name]))),
        *((name.replace("_", " "), text) for name, text in data["metadata"].items()),
        ("likely triggers", ", ".join(f"{t['tag']} ({t['captions']})" for t in data["likely_triggers"])),
    ]
    print_table(("", "inspected"), [row for row in rows if row[1]])
    print()
    weighed = any(row["relative"] is not None for row in data["change"])
    print_table(
        ("block", "modules", "change", "of the base" if weighed else ""),
        [
            (
                row["block"],
                str(row["modules"]),
                "depends on the base" if row["norm"] is None else f"{row['norm']:.4g}",
                "" if row["relative"] is None else f"{row['relative']:.2%}",
            )
            for row in data["change"]
        ],
    )


def print_checkpoint(data: Mapping[str, Any]) -> None:
    print_description("inspected", {k: v for k, v in data.items() if k != "components" and v is not None})
    print()
    print_table(
        ("component", "parameters", "type", "variant"),
        [(c["name"], f"{c['parameters']:,}", c["dtype"], c["variant"] or "") for c in data["components"]],
    )


def listed(names: Mapping[str, Any]) -> str:
    more = names["count"] - len(names["some"])
    return "\n".join([*names["some"], *([f"and {more} more"] if more else [])])


def loss_lines(lossy: Mapping[str, str]) -> list[str]:
    """What a manifest or a checkpoint says of its loss, to people."""
    return [f"{stage} is lossy: {why}" for stage, why in lossy.items()]


def fp32_layer_lines(stages: Sequence[StageFile]) -> list[str]:
    """For people: how many layers of which stage did not become fp16."""
    return [
        f"{stage.contract.name}: {len(stage.fp32_layers)} layers stay fp32, as fp16 would overflow"
        for stage in stages
        if stage.fp32_layers
    ]
