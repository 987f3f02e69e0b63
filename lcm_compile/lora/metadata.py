"""What trainers write into a LoRA's file besides its weights: its name, its base, its trigger words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

TAGS_SHOWN = 10
TEXT_SHOWN = 300
# What trainers write, kohya's and the ModelSpec's, under the names that the report gives it.
METADATA = {
    "title": ("modelspec.title", "ss_output_name"),
    "architecture": ("modelspec.architecture",),
    "trained_on": ("ss_base_model_version",),
    "trained_from": ("ss_sd_model_name",),
    "network": ("ss_network_module",),
    "network_dim": ("ss_network_dim",),
    "network_alpha": ("ss_network_alpha",),
    "trigger_phrase": ("modelspec.trigger_phrase",),
}


def describe_metadata(metadata: Mapping[str, str]) -> dict[str, str]:
    said = {}
    for name, keys in METADATA.items():
        text = next((printable(metadata[key]) for key in keys if metadata.get(key, "None") != "None"), "")
        if text:
            said[name] = text
    return said


def printable(text: str) -> str:
    """A stranger's text, without what would move a terminal's cursor."""
    return "".join(c for c in text if c.isprintable())[:TEXT_SHOWN].strip()


def frequent_tags(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """The tags that most of the training's captions had, which is where trigger words are; kohya's counts."""
    totals: Counter[str] = Counter()
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        for counts in folders.values():
            totals.update({printable(tag): int(count) for tag, count in counts.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):  # a hint at most: a broken one is none
        return []
    return [{"tag": tag, "captions": count} for tag, count in totals.most_common(TAGS_SHOWN) if tag]


def metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    """For people: what describe_metadata and frequent_tags find."""
    said = [f"{name.replace('_', ' ')}: {text}" for name, text in describe_metadata(metadata).items()]
    tags = ", ".join(f"{tag['tag']} ({tag['captions']})" for tag in frequent_tags(metadata))
    return [*said, f"likely triggers: {tags}"] if tags else said
