"""Sample tiles; the options are in ldm/synthesis/options.py."""

from ldm.cli import parse
from ldm.synthesis.options import Options


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)

    from ldm.synthesis.request import sample

    return sample(args)
