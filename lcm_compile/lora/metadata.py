"""Reads what trainers write into a LoRA's file besides its weights: its name, its base, its trigger words."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

TAGS_SHOWN = 10
TEXT_SHOWN = 300  # characters
# The fields of a report, each with its keys in a file: those of kohya's trainers (ss_…) and of ModelSpec.
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
    """Returns the fields of METADATA and the method that a file's metadata has, as printable text."""
    fields = {}
    for name, keys in METADATA.items():
        text = next((printable(metadata[key]) for key in keys if metadata.get(key, "None") != "None"), "")
        if text:
            fields[name] = text
    if method := method_of(metadata):
        fields["distilled_by"] = method
    return fields


def method_of(metadata: Mapping[str, str]) -> str | None:
    """Returns the method by which `distill` made a LoRA, such as `tcd`; None if its metadata names none."""
    try:
        return printable(json.loads(metadata["lcm_compile"])["method"]) or None
    except (KeyError, TypeError, ValueError, RecursionError):
        return None


def printable(text: str) -> str:
    """Returns the first TEXT_SHOWN characters without control characters.

    The text comes from a stranger's file, and control characters could move a terminal's cursor.
    """
    return "".join(c for c in text if c.isprintable())[:TEXT_SHOWN].strip()


def frequent_tags(metadata: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns the most frequent tags of the training captions, with kohya's counts of captions.

    Trigger words are usually among them. Returns an empty list if the metadata has no counts, or broken ones.
    """
    totals: Counter[str] = Counter()
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
        for counts in folders.values():
            totals.update({printable(tag): int(count) for tag, count in counts.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):  # the counts are only a hint for the user
        return []
    return [{"tag": tag, "captions": count} for tag, count in totals.most_common(TAGS_SHOWN) if tag]


def metadata_lines(metadata: Mapping[str, str]) -> list[str]:
    """Returns what describe_metadata and frequent_tags find, as lines of text."""
    lines = [f"{name.replace('_', ' ')}: {text}" for name, text in describe_metadata(metadata).items()]
    tags = ", ".join(f"{tag['tag']} ({tag['captions']})" for tag in frequent_tags(metadata))
    return [*lines, f"likely triggers: {tags}"] if tags else lines
