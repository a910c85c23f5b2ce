"""What the options of sample_diffusion.py mean for given models."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ldm.cli import MOST, existing_path, shown
from ldm.data.images import class_folders, list_images
from ldm.errors import UserError
from ldm.settings import DEFAULT_COUNT, DEFAULT_SCALE, DEFAULT_STEPS, DEFAULT_STRENGTH
from ldm.synthesis.models import Models
from ldm.synthesis.settings import Sampling
from ldm.synthesis.sources import Sources


def find_class(word: str, known: Sequence[str], option: str) -> str:
    """The class that a name or an index means; a class whose name is a number wins over an index.

    Raises:
        UserError: There is no such class.
    """
    if word in known:
        return word
    if _is_whole(word) and int(word) < len(known):
        return known[int(word)]
    listed = ", ".join(f"{index}={name}" for index, name in enumerate(known))
    raise UserError(f"{option}: unknown class {word!r}; the model knows {listed}")


def choose_classes(text: str, known: Sequence[str]) -> list[str]:
    """The classes that a text such as `ADI,3` means, in the model's order.

    Raises:
        UserError: A class is unknown or given twice, or the list is empty.
    """
    words = [word.strip() for word in text.split(",") if word.strip()]
    option = f"classes={text}"
    if not words:
        raise UserError(f"{option}: empty list; the model knows {', '.join(known)}")
    chosen = [find_class(word, known, option) for word in words]
    _check_distinct(chosen, option)
    return [name for name in known if name in chosen]


def parse_counts(text: str, known: Sequence[str]) -> dict[str, int]:
    """Images per class that a text such as `ADI=500,3=200` means, in the model's order.

    Raises:
        UserError: A class is unknown or given twice, or a count is not a whole number from 1.
    """
    option, counts = f"counts={text[:60]}", {}
    names = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        word, equals, number = (piece.strip() for piece in part.rpartition("="))
        if not equals or not _is_whole(number) or not 1 <= int(number) <= MOST:
            raise UserError(
                f"{option}: {shown(part)} must be CLASS=NUMBER with a whole number from 1 to"
                f" {MOST}, as ADI=500"
            )
        names.append(find_class(word, known, option))
        counts[names[-1]] = int(number)
    if not names:
        raise UserError(f"{option}: empty list; give CLASS=NUMBER,...")
    _check_distinct(names, option)
    return {name: counts[name] for name in known if name in counts}


def balance(
    folder: str | Path, names: Sequence[str], known: Sequence[str], extra: int = 0
) -> dict[str, int]:
    """Images per class that bring each to the size of the largest class of a training folder.

    Args:
        folder: Labelled training set, FOLDER/CLASS/images.
        names: Classes to fill up.
        known: All classes of the model.
        extra: Images on top of that, for every class.

    Raises:
        UserError: `folder` is no such set, has other classes, or needs no images.
    """
    root = existing_path(folder, "balance", "tiles")
    images = Counter(path.relative_to(root).parts[0] for path in list_images(root))
    found = {name: images[name] for name in class_folders(root)}
    different = sorted(found.keys() ^ set(known))
    if different:
        raise UserError(
            f"balance={folder}: its classes are {', '.join(found) or 'none'}, the model's "
            f"{', '.join(known)} (different: {', '.join(different)}); give a training set with the "
            "model's classes"
        )
    largest = max(found.values())
    counts = {name: largest - found[name] + extra for name in names}
    counts = {name: count for name, count in counts.items() if count > 0}
    if not counts:
        raise UserError(
            f"balance={folder}: its classes are balanced, with {largest} images each; give -n "
            "to add so many to each"
        )
    return counts


def _is_whole(text: str) -> bool:
    """Whether a text is a whole number of a sensible size; Python reads 4,300 digits at most."""
    return text.isdecimal() and len(text) <= 20


def _check_distinct(names: Sequence[str], option: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{option}: {', '.join(twice)} is given twice; name each class once")


def check_models(args: Any, models: Models) -> None:
    """Options that do nothing with these models."""
    if models.classes is None:
        for name in ("classes", "counts", "balance"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"`{name}` needs `classifier`, or a model that takes labels as `model`"
                )
    if args.cfg_scale is not None and not models.diffusion.conditional:
        raise UserError(
            f"`cfg_scale` needs a model that takes labels; {args.model} is unconditional: give a "
            "label adapter as `model`, or guide with `classifier`"
        )
    guided = models.classifier is not None and args.classifier_scale != 0
    guided |= args.cfg_scale not in (None, 1) or args.autoguidance_scale is not None
    if args.guidance_interval and not guided:
        raise UserError(
            "`guidance_interval` needs `classifier` with a scale above 0, `cfg_scale` or "
            "`autoguidance`; give one or leave it out"
        )


def choose_counts(args: Any, models: Models) -> dict[str, int]:
    """Images per class, as the options say."""
    if args.counts is not None:
        return parse_counts(args.counts, models.names)
    names = models.names if args.classes is None else choose_classes(args.classes, models.names)
    if args.balance is not None:
        return balance(args.balance, names, models.names, args.n_samples or 0)
    return dict.fromkeys(names, args.n_samples or DEFAULT_COUNT)


def choose_sampling(args: Any, models: Models) -> Sampling:
    """The `Sampling` that the options mean for these models."""
    process = models.diffusion.schedule
    T, sampler = process.T, args.sampler_for(process)
    if sampler not in process.samplers:
        raise UserError(
            f"`sampler` {sampler} does not suit {args.model}; choose {', '.join(process.samplers)}"
        )
    if args.eta is not None and sampler != "ddim":
        raise UserError(f"`eta` {args.eta:g} belongs to DDIM; leave it out with {sampler}")
    steps = args.custom_steps or (T if sampler == "ddpm" else min(DEFAULT_STEPS, T))
    if steps > T:
        raise UserError(f"`custom_steps` {steps} must be in [1, {T}], the training time steps")
    scale, heat = 0.0, 1.0
    if models.classifier is not None:
        scale = DEFAULT_SCALE if args.classifier_scale is None else args.classifier_scale
        heat = args.temperature or float(models.classifier.temperature)
    # What each sampler is, in DDIM's terms: ancestral sampling has the noise of eta 1.
    eta = {"ddim": 1.0 if args.eta is None else args.eta, "ddpm": 1.0}
    interval = tuple(args.guidance_interval) if args.guidance_interval else None
    if interval is None and scale > 0:
        interval = process.guided_interval
    return Sampling(
        sampler=sampler,
        steps=steps,
        eta=eta.get(sampler, 0.0),
        scale=scale,
        seed=args.seed,
        interval=interval,
        ema=args.ema,
        guidance_on=args.guidance_on or "z_t",
        normalise=args.guidance_norm,
        clip=args.guidance_clip,
        temperature=heat,
        cfg_scale=1.0 if args.cfg_scale is None else args.cfg_scale,
        autoguidance_scale=1.0 if args.autoguidance_scale is None else args.autoguidance_scale,
        limit=args.latent_limit,
        strength=(args.strength or DEFAULT_STRENGTH) if args.start_from else None,
        source_detail=args.source_detail,
    )


def choose_sources(args: Any, models: Models, counts: dict[str, int]) -> Sources | None:
    """The tiles of `start_from`, which `models` then records; None without it."""
    if args.start_from is None:
        return None
    if models.classes is None:
        raise UserError(
            "`start_from` needs `classifier`, or a model that takes labels as `model`: a variation "
            "is made for a class"
        )
    existing_path(args.start_from, "start_from", "tiles")
    sources = Sources(
        args.start_from,
        models.diffusion,
        models.classes,
        models.classifier,
        args.start_confidence or 0.0,
    )
    sources.require([name for name, count in counts.items() if count])
    models.files["start_from"] = sources.digest
    return sources
