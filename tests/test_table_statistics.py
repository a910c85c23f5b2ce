"""Differences of arms: found where planted, absent where not, and refused where not comparable."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.special import polygamma
from tables import CLASSES, predictions, row

from ldm.errors import UserError
from ldm.evaluation.metrics import confusion_matrix, scores
from ldm.evaluation.predictions import Predictions
from ldm.experiment.results import Table
from ldm.experiment.statistics import (
    METRICS,
    Arm,
    compare_pairs,
    differences,
    holm,
    influence,
    inverse_trigamma,
    prior_of,
    pseudo_pairs,
    random_pairs,
    read_arm,
    resample_means,
    stars,
    sum_by_group,
)


def arms(
    rng: np.random.Generator,
    seeds: int = 5,
    images: int = 300,
    effect: float = 0.0,
    sd_seed: float = 0.0,
    sd_group: float = 0.0,
    groups: int | None = None,
) -> tuple[Arm, Arm]:
    """A reference and an arm whose expected score is `effect` higher.

    Args:
        sd_seed: Of the quality of a network around that of its arm.
        sd_group: Of what an arm gains or loses on all images of a group, whatever the seed.
    """
    easy = rng.normal(1, 1, images)
    of, names = np.arange(images), None
    if groups:
        of = np.sort(rng.integers(0, groups, images))
        names = [f"slide{g}" for g in of]
    made = []
    for key, gain in (("real", 0.0), ("arm", effect)):
        common = easy + gain + rng.normal(0, sd_group, of.max() + 1)[of]
        runs = [predictions(rng, common + rng.normal(0, sd_seed), names) for _ in range(seeds)]
        made.append(Arm(key, list(range(seeds)), runs))
    return made[0], made[1]


def compare(reference: Arm, arm: Arm, resamples: int = 2000, seed: int = 0):
    """Differences in accuracy and in macro F1."""
    both = {"real": reference, "arm": arm}
    return compare_pairs([("reference", "arm", "real")], both, "test", resamples, seed)


def table_of(tmp_path, made: dict[str, Arm], kinds: dict[str, str] | None = None, **values):
    """A table with these predictions as files."""
    rows = []
    for key, arm in made.items():
        files = {}
        for seed, run in zip(arm.seeds, arm.runs, strict=True):
            files[seed] = {"test": tmp_path / key / f"seed{seed}.csv"}
            run.write(files[seed]["test"])
        rows.append(row(key, (kinds or {}).get(key, "synthetic"), predictions=files))
    fields = {"umap": None, "record": {}, "settings": {}, "paper": {}, **values}
    return Table("t", "T", rows, "real", ["test"], CLASSES, **fields)


def test_a_planted_difference_is_found(tmp_path):
    # One draw in twenty would find a difference that is not there; this one does not.
    real, better = arms(np.random.default_rng(2), effect=0.6, sd_seed=0.05)
    _, same = arms(np.random.default_rng(2), effect=0.0, sd_seed=0.05)
    table = table_of(tmp_path, {"real": real, "better": better, "same": same})
    found = {(d.row, d.metric): d for d in differences(table, 3000)}
    assert set(found) == {(key, m) for key in ("better", "same") for m in METRICS}
    for metric in METRICS:
        high = found["better", metric]
        assert high.p_holm < 0.01 and stars(high.p_holm) == "**" and high.low > 0
        assert high.low < high.mean < high.high and high.seeds == (0, 1, 2, 3, 4)
        low = found["same", metric]
        assert low.p_holm > 0.05 and low.low < 0 < low.high and stars(low.p_holm) == ""
    accuracy = [np.mean(run.predicted == run.labels) for run in better.runs]
    base = [np.mean(run.predicted == run.labels) for run in real.runs]
    assert found["better", "accuracy"].mean == pytest.approx(np.mean(accuracy) - np.mean(base))
    # The same table gives the same numbers, the other way round the opposite sign.
    assert differences(table, 3000) == differences(table, 3000)
    turned = compare(Arm("real", better.seeds, better.runs), Arm("arm", real.seeds, real.runs))
    assert turned[0].mean == pytest.approx(-found["better", "accuracy"].mean)
    assert turned[0].high < 0


# Without a difference p is uniform; two simpler tests are shown to be wrong.


def images_alone(reference: Arm, arm: Arm, rng: np.random.Generator) -> float:
    """p of a bootstrap over images of one pair of networks: what McNemar's test asks."""
    d = (arm.runs[0].predicted == arm.runs[0].labels).astype(float)
    d -= reference.runs[0].predicted == reference.runs[0].labels
    draws = resample_means((d - d.mean())[:, None], 400, rng)[:, 0] + d.mean()
    return 2 * min(np.mean(draws <= 0), np.mean(draws >= 0))


def seeds_with_replacement(reference: Arm, arm: Arm, rng: np.random.Generator) -> float:
    """p where the few seeds are resampled like images."""
    d = np.array(
        [
            np.mean(a.predicted == a.labels) - np.mean(b.predicted == b.labels)
            for a, b in zip(arm.runs, reference.runs, strict=True)
        ]
    )
    draws = d[rng.integers(len(d), size=(400, len(d)))].mean(axis=1)
    return 2 * min(np.mean(draws <= 0), np.mean(draws >= 0))


@pytest.mark.parametrize(
    "chance",
    [
        {"seeds": 3, "sd_seed": 0.25},  # all scatter is the training's
        {"seeds": 5, "sd_seed": 0.0},  # networks differ in which images they miss, only
        {"seeds": 5, "sd_seed": 0.1, "groups": 25, "sd_group": 0.4},  # slides suit an arm or not
    ],
)
def test_without_a_difference_p_is_uniform(chance):
    rng = np.random.default_rng(1)
    repeats = 200
    p, one_pair, few = [], [], []
    for i in range(repeats):
        reference, arm = arms(rng, images=150, **chance)
        p.append(compare(reference, arm, 400, seed=i)[0].p)
        one_pair.append(images_alone(reference, arm, rng))
        few.append(seeds_with_replacement(reference, arm, rng))
    # Of 200 binomial draws, 4 standard deviations: 0.06 at 0.05, 0.14 at 0.5.
    for level in (0.05, 0.2, 0.5):
        error = 4 * (level * (1 - level) / repeats) ** 0.5
        assert np.mean(np.array(p) <= level) == pytest.approx(level, abs=error)
    if chance["seeds"] == 3:
        assert np.mean(np.array(one_pair) <= 0.05) > 0.2
        assert np.mean(np.array(few) <= 0.05) > 0.2


def many_arms(rng: np.random.Generator, count: int, seeds: int, effect: float) -> dict[str, Arm]:
    """A reference, an arm that is better, and `count` - 2 that are not."""
    easy = rng.normal(1, 1, 150)
    made = {}
    for i in range(count):
        key, gain = ("real", "arm", *range(count))[i], effect * (i == 1)
        runs = [predictions(rng, easy + gain + rng.normal(0, 0.2)) for _ in range(seeds)]
        made[str(key)] = Arm(str(key), list(range(seeds)), runs)
    return made


def test_the_arms_of_a_table_lend_one_another_their_deviation():
    rng = np.random.default_rng(0)
    pairs = [("reference", "arm", "real")]
    p, narrower, found, found_alone = [], [], 0, 0
    for i in range(80):
        same, better = (many_arms(rng, 8, 3, effect) for effect in (0.0, 0.5))
        p.append(compare_pairs(pairs, same, "test", 400, i)[0].p)
        with_others = compare_pairs(pairs, better, "test", 400, i)[0]
        alone = compare(better["real"], better["arm"], 400, i)[0]
        assert with_others.mean == alone.mean
        narrower.append((with_others.high - with_others.low) / (alone.high - alone.low))
        found += with_others.p < 0.05
        found_alone += alone.p < 0.05
    assert np.mean(np.array(p) < 0.05) == pytest.approx(0.05, abs=4 * (0.05 * 0.95 / 80) ** 0.5)
    assert np.median(narrower) < 0.7
    assert found > 1.3 * found_alone


def test_prior_of_variances():
    rng = np.random.default_rng(0)
    same = 2.5 * rng.chisquare(4, 4000) / 4
    prior = prior_of(same, [4] * 4000)
    assert prior.variance == pytest.approx(2.5, rel=0.05) and prior.degrees > 80
    # Variances that are themselves drawn from a scaled inverse chi-square with 6 degrees.
    own = 2.5 * 6 / rng.chisquare(6, 4000)
    prior = prior_of(own * rng.chisquare(4, 4000) / 4, [4] * 4000)
    assert prior.variance == pytest.approx(2.5, rel=0.05)
    assert prior.degrees == pytest.approx(6, rel=0.15)
    # A difference has the variances of two arms; the others weigh at most twice as much.
    mixed, degrees = prior.moderate(20.0, 2, arms=2)
    assert degrees == 6 and mixed == pytest.approx((4 * 2 * prior.variance + 2 * 20) / 6)
    assert prior_of(same[:5], [4] * 5).moderate(20.0, 2, 2) == (20.0, 2)
    few = prior_of(same[:6], [1] * 6)
    assert few.moderate(20.0, 4, 2)[1] <= max(4, few.most)


def test_tiles_of_a_slide_are_not_independent():
    """Ungrouped, an arm that suits one slide by chance looks better than it is."""
    rng = np.random.default_rng(3)
    reference, arm = arms(rng, images=600, groups=12, sd_group=1.0)
    grouped = compare(reference, arm)[0]
    for one in (reference, arm):
        for run in one.runs:
            run.groups = None
    single = compare(reference, arm)[0]
    assert grouped.groups == 12 and single.groups is None
    assert grouped.mean == single.mean
    assert grouped.high - grouped.low > 1.5 * (single.high - single.low)


def test_few_groups_are_noted():
    reference, arm = arms(np.random.default_rng(0), groups=4)
    assert "only 4 groups" in compare(reference, arm)[0].note


def test_holm_worked_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04, times 4, 3, 2, 1: 0.02, 0.03, 0.06, 0.04 -> 0.06
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.7, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_is_the_greatest_of_the_products_so_far():
    """The definition of Holm (1979), which the library has to agree with."""
    p = np.random.default_rng(0).random(20) ** 3
    expected, largest = [0.0] * 20, 0.0
    for rank, i in enumerate(np.argsort(p)):
        largest = max(largest, min(1.0, (20 - rank) * p[i]))
        expected[i] = largest
    np.testing.assert_allclose(holm(p.tolist()), expected, rtol=1e-12)


@pytest.mark.parametrize("y", [1e-6, 0.01, 0.5, 1.0, 3.0, 100.0, 1e6])
def test_inverse_trigamma(y):
    assert polygamma(1, inverse_trigamma(y)) == pytest.approx(y, rel=1e-12)


def test_stars():
    assert [stars(p) for p in (None, 0.05, 0.049, 0.01, 0.009)] == ["", "", "*", "*", "**"]


def test_fewer_than_three_seeds_claim_nothing():
    reference, arm = arms(np.random.default_rng(0), seeds=2, effect=2.0)
    found = compare(reference, arm)[0]
    assert found.mean > 0.1 and found.p is found.low is found.p_holm is None
    assert "2 seeds" in found.note
    # Seeds are paired by number, so only those that both have count.
    reference, arm = arms(np.random.default_rng(0), seeds=4, effect=2.0)
    moved = Arm("arm", [2, 3, 4, 5], arm.runs)
    found = compare(reference, moved)[0]
    assert found.seeds == (2, 3) and found.p is None
    apart = Arm("arm", [7, 8, 9, 10], arm.runs)
    assert "no seed in common" in compare(reference, apart)[0].note


def test_equal_differences_of_all_seeds_are_no_certainty():
    """On small sets D_s may agree by chance; a t test would give p = 0."""
    labels = np.repeat([0, 1, 2], 10)
    paths = [f"{i}.png" for i in range(30)]

    def run(wrong: list[int]) -> Predictions:
        predicted = labels.copy()
        predicted[wrong] = (predicted[wrong] + 1) % 3
        return Predictions(CLASSES, paths, labels, predicted, np.zeros((30, 3)))

    reference = Arm("real", [0, 1, 2], [run([1, 2]), run([11, 12]), run([21, 22])])
    arm = Arm("arm", [0, 1, 2], [run([5]), run([15]), run([25])])
    found = compare(reference, arm)[0]
    assert found.mean == pytest.approx(1 / 30)
    assert found.low < 0 < found.high and found.p > 0.05


def test_a_deterministic_baseline_is_compared_with_every_seed(tmp_path):
    real, arm = arms(np.random.default_rng(0), effect=-1.5)
    made = {"real": real, "colour": Arm("colour", [0], arm.runs[:1])}
    found = differences(table_of(tmp_path, made, {"colour": "baseline"}), 500)
    assert found[0].seeds == (0, 1, 2, 3, 4) and found[0].high < 0
    # One seed of a network that could have come out otherwise says nothing of that sort.
    assert differences(table_of(tmp_path, made), 500)[0].p is None
    # Nor does a baseline that is trained, of which one seed is all that is there yet.
    table = table_of(tmp_path, made, {"colour": "baseline"})
    table.rows[1] = replace(table.rows[1], summary={"updates": 2000})
    (found, _) = differences(table, 500)
    assert found.seeds == (0,) and found.p is None and "1 seed" in found.note


# Refusals


def changed(run: Predictions, **values) -> Predictions:
    return replace(run, **values)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda r: {"paths": [*r.paths[:5], "X.png", *r.paths[6:]]}, "X.png"),
        (lambda r: {"paths": [*r.paths[1::-1], *r.paths[2:]]}, "in row 1"),
        (lambda r: {"labels": np.roll(r.labels, 1)}, "in row 1"),
        (lambda r: {"classes": ["ADI", "TUM", "LYM"]}, "classes"),
        (lambda r: {"groups": ["a"] * len(r.paths)}, "groups"),
        (
            lambda r: {
                "paths": r.paths[:-1],
                "labels": r.labels[:-1],
                "predicted": r.predicted[:-1],
                "probabilities": r.probabilities[:-1],
            },
            "nothing in row 300",
        ),
    ],
)
def test_arms_of_other_images_are_refused(change, words):
    reference, arm = arms(np.random.default_rng(0))
    other = Arm("arm", arm.seeds, [changed(run, **change(run)) for run in arm.runs])
    for found in compare(reference, other):
        assert found.mean is found.p is None
        assert words in found.note


def test_predictions_that_are_missing_mixed_up_or_not_of_the_summary(tmp_path):
    real, arm = arms(np.random.default_rng(0), seeds=3)
    table = table_of(tmp_path, {"real": real, "arm": arm, "none": Arm("none", [], [])})
    one = next(r for r in table.rows if r.key == "arm")
    assert "no predictions of test" in differences(table, 100)[-1].note
    accuracy = float(np.mean(arm.runs[1].predicted == arm.runs[1].labels))
    for value, fine in ((accuracy, True), (accuracy + 0.01, False)):
        said = replace(one, summary={"per_seed": [{"seed": 1, "test": {"accuracy": value}}]})
        if fine:
            assert read_arm(said, "test").seeds == [0, 1, 2]
            continue
        with pytest.raises(UserError, match="not the .* of summary.json"):
            read_arm(said, "test")
    changed(arm.runs[2], paths=arm.runs[2].paths[::-1]).write(one.predictions[2]["test"])
    with pytest.raises(UserError, match="the first seed"):
        read_arm(one, "test")
    one.predictions[2]["test"].unlink()
    with pytest.raises(UserError, match="missing"):
        read_arm(one, "test")


def test_selected_rows_are_paired_with_random_ones_of_the_same_pool():
    def of(key, **factors):
        return row(key, factors={"selection": "centroid", "generator": "a", "ratio": 50, **factors})

    rows = [
        of("a50"),
        of("a50r", selection="random"),
        of("b50", generator="b"),
        of("a100", ratio=100),
        of("a100r", ratio=100, selection="random"),
        of("a100k", ratio=100, selection="knn"),
        row("real", "real"),
    ]
    assert random_pairs(rows) == [("a50", "a50r"), ("a100", "a100r"), ("a100k", "a100r")]


def test_rows_are_compared_with_those_of_as_many_labels():
    """With real tiles alone, and selected synthetic tiles with pseudo-labelled real ones."""
    rows = []
    for n in (10, 25):
        rows.append(row(f"real@{n}", "real", factors={"labels": n}))
        for kind, selection in (
            ("synthetic", "random"),
            ("synthetic", "sure"),
            ("pseudo", "random"),
        ):
            factors = {"selection": selection, "ratio": 100, "labels": n}
            rows.append(row(f"{kind}-{selection}@{n}", kind, factors=factors))
    fields = {"umap": None, "record": {}, "settings": {}, "paper": {}}
    table = Table("t", "T", rows, "real@10", ["test"], CLASSES, **fields)
    assert [table.reference_of(one) for one in rows] == ["real@10"] * 4 + ["real@25"] * 4
    assert pseudo_pairs(rows) == [
        ("synthetic-sure@10", "pseudo-random@10"),
        ("synthetic-sure@25", "pseudo-random@25"),
    ]
    families = {(d.family, d.row, d.reference) for d in differences(table)}
    assert ("pseudo", "synthetic-sure@25", "pseudo-random@25") in families
    assert ("reference", "real@25", "real@10") not in families


# Arithmetic


@pytest.mark.parametrize("metric", METRICS)
def test_influence_is_the_change_when_images_are_drawn_again(metric):
    rng = np.random.default_rng(0)
    run = predictions(rng, rng.normal(0.8, 1, 600))
    run.labels[:] = rng.permutation(run.labels)  # unequal F1 of the classes
    value, phi = influence(run, metric)
    assert phi.mean() == pytest.approx(0, abs=1e-12)

    def exact(index) -> float:
        matrix = confusion_matrix(run.labels[index], run.predicted[index], 3)
        return scores(matrix, CLASSES)[metric]

    assert value == pytest.approx(exact(np.arange(600)))
    draws = [rng.integers(600, size=600) for _ in range(200)]
    changes = np.array([exact(index) - value for index in draws])
    first_order = np.array([phi[index].mean() for index in draws])
    # What remains is of second order.
    assert np.corrcoef(changes, first_order)[0, 1] > 0.995
    assert first_order.std() == pytest.approx(changes.std(), rel=0.03)


def test_a_class_that_does_not_occur_is_left_out_of_the_macro_mean():
    run = Predictions(CLASSES, list("abcd"), np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1]),
                      np.zeros((4, 3)))  # fmt: skip
    assert influence(run, "macro_f1")[0] == pytest.approx((2 / 3 + 4 / 5) / 2)


def test_groups_of_unequal_size_keep_the_mean():
    phi = np.array([[1.0, 2.0, -3.0, 0.5], [0.0, 1.0, 1.0, -2.0]])
    u = sum_by_group(phi, ["b", "a", "b", "b"])
    assert u.tolist() == [[2.0 / 2, -1.5 / 2], [1.0 / 2, -1.0 / 2]]
    assert u.mean(axis=1) == pytest.approx(phi.mean(axis=1))
    assert sum_by_group(phi, None) is phi


def test_resamples_are_shared_by_all_columns_and_unbiased():
    u = np.random.default_rng(0).normal(size=(50, 1))
    means = resample_means(np.concatenate([u, 2 * u], axis=1), 5000, np.random.default_rng(1))
    np.testing.assert_allclose(means[:, 1], 2 * means[:, 0])
    assert means[:, 0].mean() == pytest.approx(u.mean(), abs=4 * u.std() / 50**0.5 / 5000**0.5)
    assert means[:, 0].std() == pytest.approx(u.std() / 50**0.5, rel=0.05)
