"""Numbers of images by class: the meaning of the options classes, counts and balance."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ldm.errors import UserError


def find_class(word: str, known: Sequence[str], option: str) -> str:
    """The class that a name or an index means; a class whose name is a number wins over an index.

    Raises:
        UserError: There is no such class.
    """
    if word in known:
        return word
    if word.isdecimal() and int(word) < len(known):
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
    option, counts = f"counts={text}", {}
    names = []
    for part in (part.strip() for part in text.split(",") if part.strip()):
        word, equals, number = (piece.strip() for piece in part.rpartition("="))
        if not equals or not number.isdecimal() or int(number) < 1:
            raise UserError(
                f"{option}: {part!r} must be CLASS=NUMBER with a whole number from 1, as ADI=500"
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
    from ldm.cli import existing_path
    from ldm.data.images import class_folders, list_images

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


def _check_distinct(names: Sequence[str], option: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{option}: {', '.join(twice)} is given twice; name each class once")
