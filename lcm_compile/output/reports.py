"""Prints plans, bundles, LoRAs, checkpoints and parity figures as tables and lines."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lcm_compile.bundles.manifest import Parity, StageFile
from lcm_compile.output.console import print_table, size_text
from lcm_compile.system.limits import available_memory

# A `run` prints too, and has no use for all that plans a build.
if TYPE_CHECKING:
    from lcm_compile.builder.estimate import Estimate
    from lcm_compile.builder.plan import ExportPlan, Plan
    from lcm_compile.lora.find import PlannedLora


def print_plan(plan: Plan, cost: Estimate | None) -> None:
    """Prints a build's plan; `cost` is the estimate of the build, or None if there is none."""
    export = plan.export
    model = (
        []
        if export is None
        else [
            ("base", f"{export.checkpoint.location} ({export.checkpoint.architecture})"),
            ("vae", export.checkpoint.components["vae"].location),
            *((f"lossy {stage}", why) for stage, why in export.lossy.items()),
            ("few-step method", few_step_line(export)),
            *((f"{p.role} LoRA", lora_line(p)) for p in export.loras),
            *(((("LoRA slots", slots_line(export)),)) if export.spec.lora_slots else ()),
            *(("embedding", str(p.spec)) for p in export.checkpoint.embeddings),
            *((guide.kind, str(guide)) for guide in export.spec.guides),
            *((("IP-Adapter", ip_adapter_line(export)),) if export.spec.ip_adapter else ()),
            *((("LoRA keys left out", ", ".join(export.spec.lora_skip)),) if export.spec.lora_skip else ()),
            ("shape", str(export.shape)),
            ("prompt tokens", str(export.spec.prompt_tokens)),
            *((("clip skip", str(export.spec.clip_skip)),) if export.spec.clip_skip else ()),
            ("rewrites", ", ".join(export.spec.rewrites) or "none"),
            *((("graphs", "one for the complete picture"),) if export.spec.whole_loop else ()),
            *((f"precision of {stage}", precision) for stage, precision in export.precisions.items()),
        ]
    )
    rows = [
        *model,
        ("target", f"{plan.target.name} ({plan.target.description})"),
        ("backend", "\n".join((plan.backend_name, *(f"not {reason}" for reason in plan.passed_over)))),
        *(() if cost is None else estimate_rows(cost)),
        ("bundle", str(plan.folder)),
        ("hit" if plan.hit else "miss", "\n".join(plan.reasons)),
    ]
    print_table(("", "plan"), rows)


def lora_line(lora: PlannedLora) -> str:
    """Returns a planned LoRA's file, its weight, and the name that this is changed by if it is not fused."""
    called = "" if lora.spec.name is None else f", by default; run --lora-weight {lora.spec.name}=W"
    return f"{lora.path} × {lora.spec.effective}{called}"


def ip_adapter_line(export: ExportPlan) -> str:
    """Returns a plan's IP-Adapter with its weight, and where its image encoder is."""
    from lcm_compile.checkpoint.ip_adapter import IP_ENCODER

    return f"{export.spec.ip_adapter}, with {export.checkpoint.components[IP_ENCODER].location}"


def slots_line(export: ExportPlan) -> str:
    """Returns how many LoRAs of which rank a plan's bundle has room for."""
    return f"{export.spec.lora_slots} of rank {export.spec.lora_rank}"


def few_step_line(export: ExportPlan) -> str:
    """Returns a plan's few-step method and the licence of its weights in words."""
    if export.few_step is None:
        return "a full LCM" if export.checkpoint.has_guidance_embedding else "none: an ordinary base"
    licence = f", licence {export.few_step_licence}" if export.few_step_licence else ""
    return f"{export.few_step.name}{licence}"


def licence_line(export: ExportPlan) -> str | None:
    """Returns a line on few-step weights that must not be used commercially, or None."""
    from lcm_compile.lora.few_step import is_non_commercial

    if not is_non_commercial(export.few_step_licence):
        return None
    return f"licence: the few-step weights are {export.few_step_licence}, not for commercial use"


def estimate_rows(cost: Estimate) -> list[tuple[str, str]]:
    """Returns the rows of a plan's table that show its estimated disk space, memory and time."""
    rows = [("disk", f"{size_text(cost.bundle_bytes)}, and {size_text(cost.disk_bytes)} while it is built")]
    time = f"about {time_text(cost.seconds)} on 2 cores"
    memory = size_text(cost.memory_bytes)
    return [*rows, ("memory", ", and ".join(filter(None, (memory, lacks_memory(cost))))), ("time", time)]


def lacks_memory(cost: Estimate) -> str:
    """Returns what this machine or container has left if it is less memory than a build takes, else ""."""
    available = available_memory()
    enough = available is None or available >= cost.memory_bytes
    return "" if enough else f"only {size_text(available or 0)} are available here"


def time_text(seconds: float) -> str:
    """Returns seconds as text, in minutes from 100 seconds on."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def parity_line(figures: Mapping[str, Parity]) -> str:
    """Returns a line with the parity of each stage, in dB, and what was compared with torch.

    What holds for most stages is told alone: the encoders' graphs have no twin.
    """
    values = ", ".join(f"{name} {figure.db:.0f} dB" for name, figure in figures.items())
    parts = sorted({part for figure in figures.values() for part in figure.checked.split("; ")})
    told = [part for part in parts if not any(other.startswith(f"{part}, ") for other in parts)]
    return f"parity with torch ({'; '.join(told)}): {values}"


def print_parity(figures: Mapping[str, Parity]) -> None:
    """Prints the parity of each stage and the floor that it must reach, in dB."""
    rows = [
        (name, f"{f.db:.1f}", f"{f.floor:g}", f.checked, "ok" if f.passed else "MISS")
        for name, f in figures.items()
    ]
    print_table(("stage", "dB", "needs", "checked", ""), rows)


def print_description(name: str, description: Mapping[str, Any]) -> None:
    """Prints a description of `describe` as a table under the heading `name`; leaves out empty values."""
    print_table(("", name), [(key, value_text(value)) for key, value in description.items() if value != {}])


def value_text(value: Any) -> str:
    """Returns a value of a description as text; a dictionary or a list of them has an item on each line."""
    if isinstance(value, dict):
        return "\n".join(f"{k}: {value_text(v)}".replace("\n", "\n  ") for k, v in value.items())
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "\n".join(
            ", ".join(f"{k} {value_text(v)}" for k, v in item.items() if v != {}) for item in value
        )
    if isinstance(value, list):
        return ", ".join(map(value_text, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def print_lora(data: Mapping[str, Any]) -> None:
    """Prints the description of a LoRA: what it is, then how much it changes each block of the UNet."""

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
        ("few-step method", few_step_text(data["few_step"]) if data["few_step"] else ""),
        ("embeddings", ", ".join(data["embeddings"])),
        ("likely triggers", ", ".join(f"{t['tag']} ({t['captions']})" for t in data["likely_triggers"])),
    ]
    print_table(("", "inspected"), [row for row in rows if row[1]])
    print()
    compared = any(row["relative"] is not None for row in data["change"])
    print_table(
        ("block", "modules", "change", "of the base" if compared else ""),
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


def few_step_text(found: Mapping[str, Any]) -> str:
    """Returns the few-step method of a LoRA as text, with the options of `build` for it."""
    if found["unsupported"]:
        what = f"not supported: {found['unsupported']}"
    elif found["variant"] == "lcm":
        what = f"{found['method']}, like LCM"
    elif found["variant"]:
        steps, _, guided = found["variant"].partition("-")
        what = f"{found['method']}, {steps} step{'' if steps == '1' else 's'}"
        what += ", with guidance" if guided else ""
    elif found["variants"]:
        what = f"{found['method']}, its variant unknown ({', '.join(found['variants'])})"
    else:
        what = found["method"] or "one that is not known"
    build = f"; build {found['build']}" if found["build"] else ""
    return f"{what} ({found['sure']}: {found['because']}){build}"


def print_checkpoint(data: Mapping[str, Any]) -> None:
    """Prints the description of a checkpoint: what it is, then its components."""
    print_description("inspected", {k: v for k, v in data.items() if k != "components" and v is not None})
    print()
    print_table(
        ("component", "parameters", "type", "variant"),
        [(c["name"], f"{c['parameters']:,}", c["dtype"], c["variant"] or "") for c in data["components"]],
    )


def listed(names: Mapping[str, Any]) -> str:
    """Returns the names of `some`, one on each line, and how many more `count` includes."""
    more = names["count"] - len(names["some"])
    return "\n".join([*names["some"], *([f"and {more} more"] if more else [])])


def loss_lines(lossy: Mapping[str, str]) -> list[str]:
    """Returns a line for each stage that is lossy, with the reason, from a manifest or a checkpoint."""
    return [f"{stage} is lossy: {why}" for stage, why in lossy.items()]


def skip_lines(loras: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each pattern that left keys of a LoRA out, from a manifest's records of LoRAs."""
    return [
        f"{lora['source']}: {count} keys are left out by --lora-skip {shlex.quote(pattern)}"
        for lora in loras
        for pattern, count in lora.get("skipped", {}).items()
    ]


def fp32_layer_lines(stages: Sequence[StageFile]) -> list[str]:
    """Returns a line for each stage that has layers in fp32, with their number."""
    return [
        f"{stage.contract.name}: {len(stage.fp32_layers)} layers stay fp32, as fp16 would overflow"
        for stage in stages
        if stage.fp32_layers
    ]
