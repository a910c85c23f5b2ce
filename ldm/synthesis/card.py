"""The card of a synthetic data set: README.md with the front matter of Hugging Face."""

import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import yaml

ROLES = {
    "diffusion": "diffusion model",
    "classifier": "guiding classifier",
    "autoguidance": "weaker model (autoguidance)",
    "first_stage": "fine-tuned decoder",
}
# Upper ends of the sizes that Hugging Face knows.
SIZES = {1_000: "n<1K", 10_000: "1K<n<10K", 100_000: "10K<n<100K", 1_000_000: "100K<n<1M"}
LIMITS = """\
## Intended use and limits

Made to augment training sets in research. Not for diagnosis, not for any decision about a patient,
and not a substitute for real tissue in an evaluation: report results on real images only.

- A label is what was asked of the model, not what a pathologist saw. Select images before use.
- The images show what the models learned from their training tiles, with the gaps, stains and
  errors of these; rare appearances may be missing.
- A generative model can reproduce training images. Run `histodiffusion copies` before images are
  passed on, and keep to the terms under which the training tiles may be used.
- The probability of a class is the opinion of the classifier that also guided, where one did. It
  is no independent measure of quality.
"""


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
    front = {
        "pretty_name": "Synthetic histopathology tiles",
        "task_categories": ["image-classification"],
        "tags": ["synthetic", "histopathology", "diffusion"],
        "size_categories": [_size(len(rows))],
    }
    return "\n".join(
        [
            "---\n" + yaml.safe_dump(front, sort_keys=False) + "---\n",
            "# Synthetic histopathology tiles\n",
            f"**All {len(rows):,} images in this folder are synthetic.** {_origin(settings)}\n",
            "One folder per class; `manifest.csv` and `manifest.parquet` say of every image how it "
            "was made.\n",
            "## Images\n",
            _table(("class", "images", "mean probability of the class"), _classes(settings, rows)),
            "## Models\n",
            _table(
                ("role", "kind", "classes", "seed", "revision", "SHA-256 of the checkpoint"),
                _models(settings, facts),
            ),
            "What the checkpoints do not record, such as the tiles that they were trained on, is "
            "not stated here.\n",
            "## Sampling\n",
            _table(("setting", "value"), _sampling(settings)),
            LIMITS,
            "## How it was made\n",
            *(_run(run) for run in runs),
        ]
    )


def _origin(settings: Mapping[str, Any]) -> str:
    """Where the images come from, and what they may still show of a patient."""
    if settings.get("strength") is None:
        return (
            "They were sampled from a latent diffusion model; none is a photograph of tissue, and "
            "none belongs to a patient."
        )
    return (
        "They are variations of real tiles: each was noised to "
        f"{settings['strength']:g} of the way to pure noise and denoised by a latent diffusion "
        "model. Each keeps something of the tile that `manifest.csv` names as its `source`, and "
        "with it of a patient: treat it like that tile."
    )


def _size(count: int) -> str:
    return next((name for limit, name in SIZES.items() if count < limit), "n>1M")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(c) for c in line) + " |" for line in lines) + "\n"


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


def _sampling(settings: Mapping[str, Any]) -> list[list[str]]:
    skipped = {"classes", *(key for key in settings if key.endswith("_sha256"))}
    return [
        [f"`{key}`", "none" if value is None else value]
        for key, value in settings.items()
        if key not in skipped
    ]


def _run(run: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return (
        f"    {shlex.join(run['command'])}\n\n"
        f"{run['started']}, {run['processes']} x {run['device']}; revision "
        f"{run['revision'] or 'unknown'}; {packages}.\n"
    )
