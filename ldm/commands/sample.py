"""The command that samples tiles; its options are in ldm/synthesis/options.py."""

from ldm.cli import parse, run_command
from ldm.synthesis.options import Options


def main(argv: list[str] | None = None) -> int:
    args = parse(Options, argv)

    from ldm.synthesis.request import sample

    return sample(args)


if __name__ == "__main__":
    run_command(main, Options)
