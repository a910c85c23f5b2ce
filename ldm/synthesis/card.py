"""The card of a synthetic data set: README.md with the front matter of Hugging Face."""

import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from ldm.report.tables import environment

ROLES = {
    "diffusion": "diffusion model",
    "classifier": "guiding classifier",
    "autoguidance": "weaker model (autoguidance)",
    "first_stage": "fine-tuned decoder",
}
# Upper ends of the sizes that Hugging Face knows.
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}


def make_card(
    settings: Mapping[str, Any],
    facts: Mapping[str, Mapping[str, Any]],
    runs: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
) -> str:
    """The card's text.

    Args:
        settings: See `ldm.synthesis.settings.make_settings`.
        facts: What each checkpoint says of itself, by role.
        runs: The starts that made images, in order: command, versions, revision, hardware.
        rows: One per image: class, prob.
    """
    size = next((name for limit, name in SIZES.items() if len(rows) < limit), "n>1M")
    sampling = [
        [f"`{key}`", "none" if value is None else value]
        for key, value in settings.items()
        if key != "classes" and not key.endswith("_sha256")
    ]
    content = {"size": size, "count": len(rows), "sampling": sampling, "runs": runs}
    content |= {"strength": settings.get("strength"), "detail": settings.get("source_detail")}
    content |= {"classes": _classes(settings, rows), "models": _models(settings, facts)}
    content |= {"shell": shlex.join}
    return environment().get_template("card.md").render(content)


def _classes(settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    probabilities: dict[str, list[float | None]] = {}
    for row in rows:
        probabilities.setdefault(row["class"], []).append(row["prob"])
    lines = []
    for name in settings["classes"] or sorted(probabilities):
        known = [prob for prob in probabilities.get(name, []) if prob is not None]
        mean = f"{fmean(known):.3f}" if known else "not measured"
        lines.append([name, f"{len(probabilities.get(name, [])):,}", mean])
    return lines


def _models(settings: Mapping[str, Any], facts: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    lines, unknown = [], "not recorded"
    for role in [role for role in ROLES if role in facts]:
        known, digest = facts[role], settings[f"{role}_sha256"]
        seed, revision = (known[key] for key in ("seed", "revision"))
        classes = ", ".join(known["classes"] or ["none"])
        lines.append(
            [ROLES[role], known["model"], classes, unknown if seed is None else seed]
            + [unknown if revision is None else f"`{revision[:12]}`", f"`{digest}`"]
        )
    return lines
