"""Command-line options of selection, and the names they allow; imports nothing heavy."""

from argparse import ArgumentParser

from ldm.cli import number

STRATEGIES = ("centroid", "confidence", "knn", "coverage", "random")
CONFIDENCES = ("judge", "manifest")


def add_network_options(parser: ArgumentParser, owner: str) -> None:
    """Options of how features are computed; None where they were not given.

    Args:
        owner: The option that names a timm network.
    """
    parser.add_argument(
        "--pretrained_weights",
        metavar="FILE",
        help=f"local weights of {owner}; without it, those in the cache of timm (no downloads)",
    )
    parser.add_argument(
        "--input_size",
        type=number(int, 8),
        help=f"pixels that {owner} sees; its own when not given",
    )
    parser.add_argument("--batch_size", type=number(int, 1), help="images per pass (64)")
    parser.add_argument(
        "--num_workers", type=number(int, 0), help="loader processes for large sets (2)"
    )
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:INDEX or mps (auto)")
