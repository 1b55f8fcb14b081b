"""Training, validation and test sets that share neither a patient nor a file."""

import numpy as np
import pandas as pd
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

SPLITS = ("train", "validation", "test")
UNLABELLED = "unlabelled"


def groups(samples: pd.DataFrame) -> np.ndarray:
    """Number the groups of photographs that share a patient or a SHA-256, directly or through other photographs.

    Args:
        samples: columns patient and source_sha256; a missing or blank value links to nothing.

    Returns:
        (n,) integers: the connected component of each row.
    """
    rows, keys, offset = [], [], 0
    for column in ("patient", "source_sha256"):
        values = samples[column].astype("string").str.strip().replace({"": pd.NA})
        codes, uniques = pd.factorize(values)
        present = np.flatnonzero(codes >= 0)
        rows.append(present)
        keys.append(codes[present] + len(samples) + offset)
        offset += len(uniques)
    row, key = np.concatenate(rows), np.concatenate(keys)
    nodes = len(samples) + offset
    graph = coo_array((np.ones(len(row), bool), (row, key)), shape=(nodes, nodes))
    return np.asarray(connected_components(graph, directed=False)[1][: len(samples)])


def split(
    samples: pd.DataFrame,
    fractions: tuple[float, float, float] = (0.65, 0.15, 0.20),
    seed: int = 0,
    fold: tuple[int, int] | None = None,
) -> pd.DataFrame:
    """Assign photographs to training, validation and test, whole groups only (see `groups`), stratified by label.

    Groups are dealt out greedily, those of the rarest label first and large before small, each to the split that
    most lacks its labels (chi-square distance to the wanted counts a label and in all). Every label goes to training
    first; as long as there are enough groups, every split gets at least one that holds it. The result depends on
    the rows and the seed, not on the order of the rows.

    Args:
        samples: columns id (unique), label (missing = unlabelled), patient, source_sha256.
        fractions: wanted shares of the labelled photographs in training, validation and test; they sum to 1, a share
            of 0 leaves that split empty, training's must be above 0.
        seed: breaks ties between groups.
        fold: (k, K): for cross-validation, the test photographs are part k, from 0, of K equal ones, and training and
            validation share the rest by the first two fractions.

    Returns:
        Columns id and split, in the order of `samples`; split is "train", "validation", "test" or, where the label is
        missing, "unlabelled". Small data may leave validation or test without a label, or empty.

    Raises:
        ValueError: an id occurs twice, the fractions are no shares, fewer than two labels are present, or the fold is
            none of at least 2.
    """
    if len(fractions) != 3 or min(fractions) < 0 or fractions[0] <= 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ValueError(f"{fractions=} must be three shares that sum to 1, the first above 0; use (0.65, 0.15, 0.2)")
    if fold is not None and not 0 <= fold[0] < fold[1] >= 2:
        raise ValueError(f"fold={fold[0]} of folds={fold[1]} must be from 0 to folds - 1, of at least 2 folds")
    if samples["id"].duplicated().any():
        raise ValueError(f"id={samples['id'][samples['id'].duplicated()].iloc[0]!r} occurs twice; ids must be unique")
    ordered = samples.sort_values("id", ignore_index=True)
    labels, names = pd.factorize(ordered["label"], sort=True)
    if len(names) < 2:
        raise ValueError(f"labels={list(names)} must hold at least two classes to train on; check the label column")
    of_row = pd.factorize(groups(ordered))[0]
    counts = np.zeros((of_row.max() + 1, len(names) + 1))
    labelled = np.flatnonzero(labels >= 0)
    np.add.at(counts, (of_row[labelled], labels[labelled]), 1)
    counts[:, -1] = counts.sum(axis=1)
    rng = np.random.default_rng(seed)
    if fold is None:
        chosen = _deal(counts, np.array(fractions), rng)
    else:
        tested = _deal(counts, np.full(fold[1], 1 / fold[1]), rng) == fold[0]
        chosen = np.full(len(counts), SPLITS.index("test"))
        chosen[~tested] = _deal(counts[~tested], np.array(fractions[:2]) / sum(fractions[:2]), rng)
    where = np.where(labels >= 0, np.array(SPLITS)[chosen[of_row]], UNLABELLED)
    result = pd.Series(where, index=ordered["id"], name="split")
    return samples[["id"]].assign(split=result.loc[samples["id"]].to_numpy())


def _deal(counts: np.ndarray, fractions: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the part (from 0) of every group, given its counts (groups, labels + 1), the last column their sum."""
    wanted = fractions[:, None] * counts.sum(axis=0)
    have = np.zeros_like(wanted)
    open_splits = np.flatnonzero(fractions > 0)
    chosen = np.zeros(len(counts), dtype=np.int64)
    waiting = counts[:, -1] > 0
    shuffled = rng.permutation(len(counts))
    by_size = shuffled[np.argsort(-counts[shuffled, -1], kind="stable")]
    holders = (counts[:, :-1] > 0).sum(axis=0)
    for label in np.argsort(holders, kind="stable"):
        queue = [group for group in by_size if waiting[group] and counts[group, label]]
        for place, group in enumerate(queue):
            lacking = open_splits[have[open_splits, label] == 0]
            candidates = open_splits
            if have[0, label] == 0:
                candidates = open_splits[:1]
            elif 0 < len(queue) - place <= len(lacking):
                candidates = lacking
            need, size = wanted[candidates], counts[group]
            # what (have - wanted)^2 / wanted grows by when the group joins
            growth = (size * (2 * (have[candidates] - need) + size) / need).sum(axis=1)
            chosen[group] = candidates[np.argmin(growth)]
            have[chosen[group]] += size
            waiting[group] = False
    return chosen
