"""Photographs that are the same file."""

import pandas as pd


def duplicates(samples: pd.DataFrame) -> pd.DataFrame:
    """The byte-identical photographs among `samples` (columns id, label, source_sha256), a row for each set of them.

    Returns columns source_sha256, ids (list of str, sorted), labels (list, None where unknown, in the order of the ids)
    and differ (bool: at least two different known labels), by the first id.
    """
    rows = []
    for digest, members in samples[samples["source_sha256"].duplicated(keep=False)].groupby("source_sha256"):
        members = members.sort_values("id")
        labels = [None if pd.isna(label) else int(label) for label in members["label"]]
        rows.append((digest, members["id"].tolist(), labels, members["label"].nunique() > 1))
    rows.sort(key=lambda row: row[1])
    return pd.DataFrame(rows, columns=["source_sha256", "ids", "labels", "differ"])


def duplicate_notes(samples: pd.DataFrame) -> list[str]:
    """What there is to say of `duplicates`: nothing, or their number and a line for each set with different labels."""
    found = duplicates(samples)
    if found.empty:
        return []
    count = int(found["ids"].map(len).sum())
    notes = [
        f"{count} photographs are byte-identical to another ({len(found)} different files); a split keeps such together"
    ]
    for ids, labels in found.loc[found["differ"], ["ids", "labels"]].itertuples(index=False):
        named = [f"{id} (label {'unknown' if label is None else label})" for id, label in zip(ids, labels, strict=True)]
        notes.append(
            f"warning: {', '.join(named[:-1])} and {named[-1]} are byte-identical with different labels; correct the "
            "labels and ingest them again, or leave them empty"
        )
    return notes
