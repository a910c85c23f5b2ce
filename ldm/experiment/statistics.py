"""Is an arm better than another? Paired differences with interval, p value and Holm correction.

Letters: S seeds, N images, G groups (patients, slides; single images where groups are unknown),
K classes, R resamples.

What is random in a difference, and how it is resampled
-------------------------------------------------------
The number of interest is the difference of two arms over all networks that could have been trained
and all patients that could have been in the set. Two things are drawn by chance, and both count:

1. *The test set.* Groups are resampled with replacement (Field and Welsh 2007), the same for both
   arms and all seeds, since all networks saw the same images: easy and hard images cancel. Tiles of
   one slide are alike, so that whole groups are drawn, not tiles.
2. *The training* (initial weights, order, augmentation). Both arms are paired by seed, and the S
   differences D_s scatter. So few values cannot be resampled: drawing 3 of 3 with replacement gives
   a variance that is a third too small, and tails that are missing. Instead each resample adds
   t_f sd / sqrt(S), the deviation that the mean of S normal values has. Three or five values also
   say little about their own deviation (the interval would be up to twice as wide), but the arms of
   a table are alike in it: sd^2 is the variance of D_s, moderated by that of all arms as far as
   theirs agree (Smyth 2004), and f grows from S - 1 accordingly, at most threefold. With fewer
   than six trained arms, or where their deviations differ widely, f stays near S - 1.

That an image is hard for one network and not for the next shows in both, and is to be counted once:
the deviations of step 1 are multiplied by sqrt(1 - MS_E / MS_G) (mean squares of the groups and of
the residuals in a two-way analysis of variance, seeds x groups; Searle, Casella and McCulloch 1992,
section 4.3), which leaves what is common to all seeds. Where the training makes all the scatter
this is the paired (moderated) t test of the seeds' differences; where the set does, the paired
bootstrap.

An exact test of one pair of networks (McNemar) or a bootstrap of images alone answers another
question: whether *these two networks* differ. Two seeds of one arm often do, so such a test finds
differences between arms that a second training takes back.

Macro F1 is no mean over images; its change under resampling is that of its influence function
(first order in 1 / N).

References:
    Field and Welsh, "Bootstrapping clustered data", JRSS B 2007; Owen, "The pigeonhole bootstrap",
    Annals of Applied Statistics 2007 (both factors of a crossed design are to be resampled, and the
    interaction is then counted too often); Smyth, "Linear models and empirical Bayes methods",
    Statistical Applications in Genetics and Molecular Biology 2004, section 6.2; Holm, "A simple
    sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.optimize import brentq
from scipy.special import digamma, polygamma

from ldm.errors import UserError
from ldm.evaluation.metrics import confusion_matrix
from ldm.evaluation.predictions import Predictions, check_same_images
from ldm.experiment.results import Row, Table

METRICS = ("accuracy", "macro_f1")
FEWEST_SEEDS = 3  # below, nothing is known about the scatter of trainings
FEWEST_ARMS = 6  # below, they say too little about one another's deviations
# The others count at most twice as much as the arm itself: that is most of what can be gained where
# all are alike, and less is lost where one scatters twice as much as they do (a rate of false
# findings of 8 to 10% instead of 5).
MOST_WEIGHT = 2
FEWEST_GROUPS = 10  # below, the bootstrap of groups is too narrow
LEVEL = 0.95
RESAMPLES = 10_000
RANDOM = "random"  # the control strategy of selection
CHUNK = 1 << 21  # random numbers that are held at a time


@dataclass(frozen=True)
class Arm:
    """What the networks of one arm said about one set."""

    key: str  # key of its row
    seeds: list[int]  # S numbers
    runs: list[Predictions]  # their predictions, in the same order
    deterministic: bool = False  # whether one run stands for all seeds: its training is not random


@dataclass(frozen=True)
class Difference:
    """Arm minus reference. Fractions, not percent; None where unknown or not claimed."""

    # "reference", or of a selection "random" (against random choice from the same pool) or "pseudo"
    # (against real tiles that the judge labelled, in the same amount).
    family: str
    row: str  # its key
    reference: str  # key of the other row
    split: str
    metric: str
    mean: float | None = None  # over the seeds that both have
    low: float | None = None  # of the interval at `LEVEL`
    high: float | None = None
    # Two-sided, of no difference; `p_holm` corrected for all rows of its family.
    p: float | None = None
    p_holm: float | None = None
    seeds: tuple[int, ...] = ()
    images: int | None = None
    groups: int | None = None  # None where images were resampled
    note: str = ""  # why something is missing; "" where nothing is


def differences(table: Table, resamples: int = RESAMPLES, seed: int = 0) -> list[Difference]:
    """All differences of a table, by family (see `Difference`), split and metric.

    A pair that cannot be compared has no numbers and says why in `note`.
    """
    rows = {row.key: row for row in table.rows}
    pairs = [("reference", row.key, table.reference_of(row)) for row in table.rows]
    pairs = [pair for pair in pairs if pair[1] != pair[2]]
    controls = control_names(table)
    pairs += [("random", *pair) for pair in random_pairs(table.rows, controls)]
    pairs += [("pseudo", *pair) for pair in pseudo_pairs(table.rows, controls)]
    found = []
    for split in table.splits:
        arms: dict[str, Arm | str] = {}
        for key, row in rows.items():
            try:
                arms[key] = read_arm(row, split)
            except UserError as error:
                arms[key] = str(error)
        found += compare_pairs(pairs, arms, split, resamples, seed)
    return found


def control_names(table: Table) -> set[str]:
    """Names of the selections that choose at random."""
    named = table.settings.get("selection") or {}
    return {RANDOM, *(name for name, one in named.items() if one.get("strategy") == RANDOM)}


def random_pairs(rows: Sequence[Row], controls: Collection[str] = (RANDOM,)) -> list[tuple]:
    """Keys of (selected, random) rows that have all other factors in common."""

    def others(row: Row) -> tuple:
        return tuple(sorted((k, str(v)) for k, v in row.factors.items() if k != "selection"))

    synthetic = [row for row in rows if "selection" in row.factors]
    random = {others(row): row.key for row in synthetic if row.factors["selection"] in controls}
    return [
        (row.key, random[others(row)])
        for row in synthetic
        if row.factors["selection"] not in controls and others(row) in random
    ]


def pseudo_pairs(rows: Sequence[Row], controls: Collection[str] = (RANDOM,)) -> list[tuple]:
    """Keys of (selected, pseudo-labelled) rows with as many labels and as many tiles beside them.

    Of several selections of pseudo-labelled tiles it is the first.
    """

    def amount(row: Row) -> tuple:
        return row.factors.get("labels"), row.factors.get("ratio")

    pseudo = {amount(row): row.key for row in reversed(rows) if row.kind == "pseudo"}
    return [
        (row.key, pseudo[amount(row)])
        for row in rows
        if row.kind == "synthetic"
        and row.factors.get("selection") not in controls
        and amount(row) in pseudo
    ]


def read_arm(row: Row, split: str) -> Arm:
    """The predictions of all seeds of a row.

    Raises:
        UserError: No predictions of this split exist, those of two seeds are of different images,
            or their accuracy is not the one in summary.json.
    """
    files = {seed: of[split] for seed, of in sorted(row.predictions.items()) if split in of}
    if not files:
        raise UserError(f"no predictions of {split}")
    runs = []
    for seed, path in files.items():
        if not Path(path).is_file():
            raise UserError(f"{path} is missing; run eval.py of this arm again")
        run = Predictions.read(Path(path))
        if runs:
            check_same_images(run, runs[0], str(path), "the first seed")
        _check_summary(run, row, seed, split, Path(path))
        runs.append(run)
    # Of a network that was trained, one run of several seeds may be all that is there yet.
    trained = (row.summary or {}).get("updates") is not None
    alone = row.kind == "baseline" and len(runs) == 1 and not trained
    return Arm(row.key, list(files), runs, deterministic=alone)


def _check_summary(run: Predictions, row: Row, seed: int, split: str, path: Path) -> None:
    accuracy = float(np.mean(run.predicted == run.labels))
    for result in (row.summary or {}).get("per_seed", ()):
        if result["seed"] != seed or split not in result:
            continue
        if abs(result[split]["accuracy"] - accuracy) > 1e-6:
            raise UserError(
                f"{path}: accuracy {accuracy:.4f} is not the {result[split]['accuracy']:.4f} of"
                " summary.json; one of them is of another run: evaluate this arm again"
            )


def influence(run: Predictions, metric: str) -> tuple[float, np.ndarray]:
    """A metric of a set, and phi (N,), what each image contributes to it to first order.

    If image i is drawn w_i times, the metric becomes value + sum_i w_i phi_i / sum_i w_i; phi
    has mean 0.
    """
    correct = run.predicted == run.labels
    if metric == "accuracy":
        value = float(correct.mean())
        return value, correct - value
    assert metric == "macro_f1", metric
    counts = confusion_matrix(run.labels, run.predicted, len(run.classes))
    both = counts.sum(axis=0) + counts.sum(axis=1)  # images + predicted, (K,)
    defined = both > 0
    f1 = 2 * np.diag(counts)[defined] / both[defined]
    value = float(f1.mean())
    # F1_k = 2 TP / (images + predicted): a quotient of two sums over images.
    per_class = np.zeros(len(both))
    share = np.zeros(len(both))
    per_class[defined] = f1 / both[defined]
    share[defined] = 2 / both[defined]
    phi = share[run.labels] * correct - per_class[run.labels] - per_class[run.predicted]
    return value, phi * len(correct) / defined.sum()


@dataclass
class _Comparison:
    """One difference before its resamples are drawn; see the head of this file."""

    difference: Difference
    by_group: np.ndarray  # (G,), mean over the seeds; its mean over groups is 0
    training: float  # deviation of the mean over seeds
    degrees: float  # of freedom


@dataclass(frozen=True)
class Prior:
    """What the arms of a table say about the variance over seeds of any one of them."""

    variance: float = 0.0  # s_0^2, of one arm
    degrees: float = 0.0  # f_0, how many degrees of freedom that is worth; 0 is nothing
    most: float = 0.0  # all degrees of freedom that there are

    def moderate(self, variance: float, degrees: int, arms: int) -> tuple[float, float]:
        """A moderated variance, the sum of those of so many arms, and its degrees of freedom."""
        weight = min(self.degrees, MOST_WEIGHT * degrees)
        total = weight + degrees
        mixed = (weight * arms * self.variance + degrees * variance) / total
        return mixed, max(degrees, min(total, self.most))


def prior_of(variances: Sequence[float], degrees: Sequence[int]) -> Prior:
    """The scaled inverse chi-square that sample variances come from (Smyth 2004, section 6.2)."""
    s2, d = np.array(variances, dtype=float), np.array(degrees, dtype=float)
    if len(s2) < FEWEST_ARMS or not np.median(s2) > 0:
        return Prior()
    # An arm whose seeds agree by chance would have log variance -inf.
    e = np.log(np.maximum(s2, 1e-5 * np.median(s2))) - digamma(d / 2) + np.log(d / 2)
    spread = float(e.var(ddof=1) - polygamma(1, d / 2).mean())
    if spread <= 0:  # they scatter no more than samples of one variance do
        return Prior(float((d * s2).sum() / d.sum()), np.inf, float(d.sum()))
    half = inverse_trigamma(spread)
    variance = float(np.exp(e.mean() + digamma(half) - np.log(half)))
    return Prior(variance, 2 * half, float(d.sum()))


def inverse_trigamma(y: float) -> float:
    """x > 0 with trigamma(x) = y, for y > 0."""
    # 1 / x + 1 / (2 x^2) < trigamma(x) < 1 / x + 1 / x^2 encloses the root; widened, since for
    # small y both bounds are 1 / y but for rounding.
    low, high = (
        widened * (1 + (1 + factor * y) ** 0.5) / (2 * y)
        for factor, widened in ((2, 0.999), (4, 1.001))
    )
    return float(brentq(lambda x: polygamma(1, x) - y, low, high, xtol=1e-14 * low, rtol=1e-14))


def compare_pairs(
    pairs: Sequence[tuple[str, str, str]],
    arms: dict[str, Arm | str],
    split: str,
    resamples: int,
    seed: int,
) -> list[Difference]:
    """Differences of pairs of arms on one split, by pair and metric.

    Args:
        pairs: (family, key of the arm, key of its reference).
        arms: By key; the reason in words where its predictions cannot be used.
    """
    found: list[Difference] = []
    waiting: list[tuple[int, _Comparison]] = []
    priors = {metric: _prior_of_arms(arms.values(), metric) for metric in METRICS}
    for family, key, reference in pairs:
        for metric in METRICS:
            empty = Difference(family, key, reference, split, metric)
            try:
                result = _prepare(arms[key], arms[reference], empty, priors[metric])
            except UserError as error:
                result = replace(empty, note=str(error))
            if isinstance(result, _Comparison):
                waiting.append((len(found), result))
                result = result.difference
            found.append(result)
    # All comparisons share their resamples: they are of the same images.
    sizes = {len(comparison.by_group) for _, comparison in waiting}
    for size in sizes:
        members = [(i, c) for i, c in waiting if len(c.by_group) == size]
        rng = np.random.default_rng([seed, size])
        stack = np.stack([c.by_group for _, c in members], axis=1)  # (G, M)
        deviations = resample_means(stack, resamples, rng)  # (R, M)
        for m, (i, c) in enumerate(members):
            draws = deviations[:, m] + c.training * rng.standard_t(c.degrees, resamples)
            draws += found[i].mean
            low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
            other_side = min(np.sum(draws <= 0), np.sum(draws >= 0))
            p = min(1.0, 2 * (1 + int(other_side)) / (1 + resamples))
            found[i] = replace(found[i], low=float(low), high=float(high), p=p)
    return _corrected(found)


def _corrected(found: list[Difference]) -> list[Difference]:
    """The same with p values corrected by Holm, for all rows of a family and metric."""
    found = list(found)
    tested = [i for i, d in enumerate(found) if d.p is not None]
    for group in {(found[i].family, found[i].metric) for i in tested}:
        members = [i for i in tested if (found[i].family, found[i].metric) == group]
        for i, p in zip(members, holm([found[i].p for i in members]), strict=True):
            found[i] = replace(found[i], p_holm=p)
    return found


def _prior_of_arms(arms: Iterable[Arm | str], metric: str) -> Prior:
    variances, degrees = [], []
    for arm in arms:
        if isinstance(arm, Arm) and len(arm.runs) > 1:
            values = [influence(run, metric)[0] for run in arm.runs]
            variances.append(float(np.var(values, ddof=1)))
            degrees.append(len(values) - 1)
    return prior_of(variances, degrees)


def _prepare(
    arm: Arm | str, other: Arm | str, empty: Difference, prior: Prior
) -> Difference | _Comparison:
    for which in (arm, other):
        if isinstance(which, str):
            raise UserError(which)
    assert isinstance(arm, Arm) and isinstance(other, Arm)
    check_same_images(arm.runs[0], other.runs[0], arm.key, other.key)
    pairs = _paired(arm, other)
    if not pairs:
        raise UserError(f"{arm.key} and {other.key} have no seed in common")
    # D (S,) and phi (S, N): differences of values and of what images contribute
    values, parts = [], []
    for _, a, b in pairs:
        (value_a, phi_a), (value_b, phi_b) = (influence(run, empty.metric) for run in (a, b))
        values.append(value_a - value_b)
        parts.append(phi_a - phi_b)
    d, phi = np.array(values), np.stack(parts)
    names = arm.runs[0].groups
    result = replace(
        empty,
        mean=float(d.mean()),
        seeds=tuple(seed for seed, _, _ in pairs),
        images=phi.shape[1],
        groups=len(set(names)) if names else None,
    )
    count = len(pairs)
    if count < FEWEST_SEEDS:
        word = "1 seed" if count == 1 else f"{count} seeds"
        return replace(result, note=f"{word}: fewer than {FEWEST_SEEDS}, no significance claimed")
    if names and len(set(names)) < 2:
        return replace(result, note="1 group: no significance claimed")
    if names and len(set(names)) < FEWEST_GROUPS:
        result = replace(
            result, note=f"only {len(set(names))} groups: the interval is likely too narrow"
        )
    by_group, residual = common_to_seeds(sum_by_group(phi, names))
    trained = 2 - arm.deterministic - other.deterministic
    variance, degrees = prior.moderate(float(d.var(ddof=1)), count - 1, trained)
    # With differences that are equal by chance (small sets) the images alone still say how much
    # the mean of the seeds must scatter.
    scatter = variance**0.5 if variance > 1e-18 else residual
    return _Comparison(result, by_group, float(scatter / count**0.5), degrees)


def _paired(arm: Arm, other: Arm) -> list[tuple[int, Predictions, Predictions]]:
    """(seed, run, run) of the seeds in common; a deterministic arm goes with every seed."""
    if arm.deterministic:
        return [(s, arm.runs[0], b) for s, b in zip(other.seeds, other.runs, strict=True)]
    if other.deterministic:
        return [(s, a, other.runs[0]) for s, a in zip(arm.seeds, arm.runs, strict=True)]
    second = dict(zip(other.seeds, other.runs, strict=True))
    return [(s, a, second[s]) for s, a in zip(arm.seeds, arm.runs, strict=True) if s in second]


def sum_by_group(phi: np.ndarray, groups: Sequence[str] | None) -> np.ndarray:
    """Contributions of images (S, N) as those of groups (S, G), whose mean is the same.

    Groups differ in size; a metric of a resampled set is divided by the images that were drawn, to
    first order by N.
    """
    if not groups:
        return phi
    _, index = np.unique(groups, return_inverse=True)
    count = int(index.max()) + 1
    sums = np.stack([np.bincount(index, row, minlength=count) for row in phi])
    return sums * (count / phi.shape[1])


def common_to_seeds(u: np.ndarray) -> tuple[np.ndarray, float]:
    """What groups contribute whatever the seed, and the scatter that they cause within a seed.

    Args:
        u: Contributions (S, G), S and G at least 2, each row with mean 0.

    Returns:
        Contributions (G,) whose resampled mean has the variance that is due to the groups alone;
        and the deviation of one seed's difference that is due to the interaction alone.
    """
    seeds, groups = u.shape
    mean = u.mean(axis=0)  # (G,)
    ms_groups = seeds * float(np.square(mean).sum()) / (groups - 1)
    ms_residual = float(np.square(u - mean).sum()) / ((seeds - 1) * (groups - 1))
    share = max(0.0, 1 - ms_residual / ms_groups) if ms_groups > 0 else 0.0
    # G / (G - 1): the variance of a bootstrap mean divides by G.
    scaled = mean * (share * groups / (groups - 1)) ** 0.5
    return scaled, (ms_residual / groups) ** 0.5


def resample_means(u: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means (R, M) of rows of u (G, M) drawn with replacement, the same for all columns."""
    groups = len(u)
    step = max(1, CHUNK // groups)
    means = []
    for start in range(0, resamples, step):
        rows = min(step, resamples - start)
        drawn = rng.integers(groups, size=(rows, groups))
        drawn += groups * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * groups).reshape(rows, groups)
        means.append(times @ u / groups)
    return np.concatenate(means)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted p values of m tests (Holm 1979).

    In rising order the i-th is max over j <= i of (m - j + 1) p_j, at most 1: with all those below
    0.05 rejected, the chance of any false rejection is below 0.05.
    """
    # Not by statsmodels, which collects garbage at every call: 85 ms in a process of tests.
    values = np.asarray(p, dtype=float)
    order = values.argsort()
    scaled = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return adjusted.tolist()


def stars(p: float | None) -> str:
    """`**` below 0.01, `*` below 0.05."""
    if p is None or p >= 0.05:
        return ""
    return "**" if p < 0.01 else "*"
