"""No patient and no file on two sides, shares kept, whatever the order of the rows."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tilestream.training import groups, split


def table(labels, patients, hashes=None):
    count = len(labels)
    hashes = hashes or [f"sha{i}" for i in range(count)]
    return pd.DataFrame(
        {
            "id": [f"{i:04d}" for i in range(count)],
            "label": pd.array(labels, dtype="Int64"),
            "patient": patients,
            "source_sha256": hashes,
        }
    )


@st.composite
def tables(draw):
    count = draw(st.integers(2, 80))
    pick = lambda values: draw(st.lists(values, min_size=count, max_size=count))  # noqa: E731
    labels = pick(st.sampled_from([0, 0, 0, 1, 1, 2, None]))
    assume(len({label for label in labels if label is not None}) > 1)
    patients = pick(st.one_of(st.none(), st.just(""), st.integers(0, 30).map(str)))
    return table(labels, patients, pick(st.integers(0, 99).map(str)))


@settings(deadline=None)
@given(tables(), st.integers(0, 9), st.randoms(use_true_random=False))
def test_no_patient_and_no_hash_on_two_sides(samples, seed, random):
    result = split(samples, seed=seed)
    assert (result["id"] == samples["id"]).all()
    joined = samples.assign(split=result["split"])
    assert ((joined["split"] == "unlabelled") == joined["label"].isna()).all()
    known = joined[joined["split"] != "unlabelled"]
    assert set(known["split"]) <= {"train", "validation", "test"}
    for column in ("patient", "source_sha256"):
        named = known[known[column].notna() & (known[column] != "")]
        assert (named.groupby(column)["split"].nunique() == 1).all()
    assert set(known.loc[known["split"] == "train", "label"]) == set(known["label"]), "training lacks a label"

    order = list(range(len(samples)))
    random.shuffle(order)
    shuffled = split(samples.iloc[order], seed=seed)
    assert shuffled.sort_values("id")["split"].tolist() == result["split"].tolist()


@settings(deadline=None)
@given(st.integers(40, 300), st.floats(0.03, 0.5), st.integers(1, 4), st.integers(0, 99))
def test_shares_of_each_label_are_kept_within_a_few_groups(count, share, group_size, seed):
    rng = np.random.default_rng(seed)
    labels = (rng.random(count) < share).astype(int)
    labels[0], labels[-1] = 0, 1
    samples = table(labels.tolist(), [str(i // group_size) for i in range(count)])
    sides = split(samples, seed=seed)["split"].to_numpy()
    for label in (0, 1):
        for name, wanted in zip(("train", "validation", "test"), (0.65, 0.15, 0.20), strict=True):
            got = ((sides == name) & (labels == label)).sum()
            assert abs(got - wanted * (labels == label).sum()) <= 2 * group_size, (name, label)


def test_rare_label_reaches_every_split_and_seed_matters():
    samples = table([0] * 97 + [1] * 3, [str(i) for i in range(100)])
    result = split(samples)
    assert set(result["split"][97:]) == {"train", "validation", "test"}
    assert result.equals(split(samples))
    assert not result.equals(split(samples, seed=1))


def test_groups_join_through_patients_and_hashes_alike():
    # 0-1 by patient, 1-2 by bytes, 2-3 by patient; 4 to 7 have no patient; hash "p" is no patient "p"
    samples = table([0] * 8, ["p", "p", "q", "q", None, None, "", ""], ["a", "b", "b", "c", "d", "e", "f", "p"])
    numbers = groups(samples)
    assert len(set(numbers[:4])) == 1
    assert len(set(numbers)) == 5


def test_training_gets_a_rare_label_even_when_it_is_full_of_another():
    # patient x brings 2 and fills training with 0; y and z hold the only two 1, each with many 0
    samples = table([2, *[0] * 40, 1, *[0] * 10, 1, *[0] * 10], ["x"] * 41 + ["y"] * 11 + ["z"] * 11)
    result = split(samples)["split"]
    assert set(samples["label"][result == "train"]) == {0, 1, 2}


def test_an_unlabelled_photograph_still_joins_its_neighbours():
    samples = table([0, None, 0] * 10 + [1] * 9, [None] * 39, None)
    samples.loc[:29, "patient"] = [p for i in range(10) for p in (f"a{i}", f"a{i}", f"b{i}")]
    samples.loc[:29, "source_sha256"] = [h for i in range(10) for h in (f"x{i}", f"y{i}", f"y{i}")]
    sides = split(samples)["split"].to_numpy()
    assert (sides[0:30:3] == sides[2:30:3]).all()
    assert (sides[1:30:3] == "unlabelled").all()


def test_a_split_with_no_share_stays_empty():
    sides = split(table([0, 1] * 20, [None] * 40), fractions=(0.8, 0.2, 0.0))["split"]
    assert sides.value_counts().to_dict() == {"train": 32, "validation": 8}


def test_refusals():
    with pytest.raises(ValueError, match="at least two classes"):
        split(table([1, 1, None], ["a", "b", "c"]))
    with pytest.raises(ValueError, match="sum to 1"):
        split(table([0, 1], ["a", "b"]), fractions=(0.5, 0.2, 0.2))
    twice = table([0, 1], ["a", "b"]).assign(id="x")
    with pytest.raises(ValueError, match="'x' occurs twice"):
        split(twice)
