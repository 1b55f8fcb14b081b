"""Take one photograph into the store: written beside all others, then committed by one exclusive file."""

from __future__ import annotations

import json
import re
import uuid
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from tilestream.store import decode, layout
from tilestream.store.fieldofview import field_of_view
from tilestream.store.files import Files, Location
from tilestream.store.pyramid import Format, write_attempt
from tilestream.store.sources import Source

_PROBLEMS = {
    "missing_file": "no such file in the folder",
    "missing_mask": "a mask that the labels name is not in the folder",
    "outside_root": "the name leads out of the folder",
    "ambiguous_name": "several files of this name, with different endings; give the ending in the labels",
}


@dataclass(frozen=True)
class Settings:
    """How photographs are taken in: their format in the store, and what bounds the decoding of each."""

    format: Format = field(default_factory=Format)
    max_megapixels: float = decode.MAX_MEGAPIXELS
    max_side_px: int = decode.MAX_SIDE_PX


def ingest_photograph(store_path: Location, source: Source, settings: Settings = Settings()) -> dict[str, Any]:
    """Ingest one photograph: committed, skipped (the same bytes are committed already) or quarantined.

    Returns {"id", "status": "committed" | "skipped" | "quarantined", "reason", "megapixels", "bytes"}: reason is the
    quarantine's code or None, megapixels and bytes (in the store) are 0 for what was quarantined. A bad photograph
    never raises; a store that is none, or cannot be written (a full disk), does. Idempotent, safe beside other writers
    of the same store and of the same photograph.
    """
    files = layout.open_store(store_path)
    digest: str | None = None
    try:
        if source.problem:
            raise decode.Unusable(source.problem, _PROBLEMS.get(source.problem, source.problem))
        name = _check_id(source.id)
        with decode.opened(source.path) as file:
            digest = decode.digest(file)
            facts, status = _committed(files, name), "skipped"
            if facts is None:
                facts = _write(files, source, file, digest, settings)
                if not files.entries(layout.attempt_name(source.id, facts["attempt"])):
                    raise OSError(f"{files.location}: the attempt at {source.id!r} was removed while it was written")
                won = files.create(name, layout.to_json(facts))
                status = "committed" if won else "skipped"
                if not won:
                    files.remove(layout.attempt_name(source.id, facts["attempt"]))
                    facts = layout.read_commit(files, name)
        if facts["source_sha256"] != digest:
            raise decode.Unusable("conflicting_source", "other bytes are committed under this id already")
        if status == "skipped" and source.masks and facts["masks"] != _mask_digests(source):
            raise decode.Unusable("conflicting_source", "it is committed already without these masks, or with others")
    except decode.Unusable as problem:
        return quarantine(files, source, problem.reason, str(problem), digest)
    files.remove(layout.quarantine_name(source.id))
    return _result(source.id, status, None, facts["height"] * facts["width"], facts["bytes"])


def quarantine(files: Files, source: Source, reason: str, message: str, digest: str | None = None) -> dict[str, Any]:
    """Record that a photograph cannot be used; what `ingest_photograph` returns of it."""
    record = {"id": source.id, "path": source.name, "sha256": digest, "reason": reason, "message": message}
    files.write(layout.quarantine_name(source.id), layout.to_json(record))
    return _result(source.id, "quarantined", reason, 0, 0)


def _result(id: str, status: str, reason: str | None, pixels: int, size_bytes: int) -> dict[str, Any]:
    return {"id": id, "status": status, "reason": reason, "megapixels": pixels / 1e6, "bytes": size_bytes}


def _check_id(id: str) -> str:
    """The name of the photograph's commit. An id that fits no table (UTF-8) or no file name is a bad name."""
    try:
        id.encode()
        if re.search("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]", id):
            raise ValueError(f"id={id!r} holds control characters; rename the file")
        return layout.commit_name(id)
    except ValueError as error:  # UnicodeEncodeError is one
        raise decode.Unusable("bad_name", str(error)) from None


def _committed(files: Files, name: str) -> dict[str, Any] | None:
    try:
        return layout.read_commit(files, name)
    except FileNotFoundError:
        return None


def _mask_digests(source: Source) -> dict[str, str]:
    found = {}
    for name, path in sorted(source.masks.items()):
        with decode.opened(path) as file:
            found[name] = decode.digest(file)
    return found


def _write(files: Files, source: Source, file: Any, digest: str, settings: Settings) -> dict[str, Any]:
    """Write an attempt, durably; the facts to commit it with. What was written is removed if this fails."""
    attempt = uuid.uuid4().hex
    folder = layout.attempt_name(source.id, attempt)
    try:
        with ExitStack() as stack, decode.damage():
            image = decode.photograph(file, settings.max_megapixels, settings.max_side_px, bool(source.masks))
            height, width = image.height, image.width
            masks = {
                name: decode.mask(stack.enter_context(decode.opened(path)), height, width)
                for name, path in sorted(source.masks.items())
            }
            made = write_attempt(files, folder, image, source.id, settings.format, masks)
        if decode.digest(file) != digest:
            raise decode.Unusable("changed", "the file changed while it was read; ingest it again")
        files.settle(folder)
    except BaseException:
        files.remove(folder)
        raise
    facts = {
        "format": layout.FORMAT,
        "id": source.id,
        "attempt": attempt,
        "source_name": source.name or Path(source.path).name,
        "source_sha256": digest,
        "height": height,
        "width": width,
        "low": made.low,
        "high": made.high,
        "levels": made.levels,
        "field_of_view": field_of_view(made.top, width / made.levels[-1][1]),
        "codec": settings.format.codec,
        "masks": _mask_digests(source),
        "bytes": made.bytes,
        "files": dict(sorted(made.files.items())),
    }
    facts = json.loads(json.dumps(facts))
    return {**facts, "seal": layout.seal(facts)}


def _ome_xml(number: int, facts: dict[str, Any]) -> str:
    size = f'SizeX="{facts["width"]}" SizeY="{facts["height"]}" SizeZ="1" SizeC="3" SizeT="1"'
    channels = "".join(f'<Channel ID="Channel:{number}:{c}" SamplesPerPixel="1"/>' for c in range(3))
    pixels = (
        f'<Pixels ID="Pixels:{number}" DimensionOrder="XYZTC" Type="uint8" {size}>{channels}<MetadataOnly/></Pixels>'
    )
    return f'<Image ID="Image:{number}" Name={quoteattr(facts["id"])}>{pixels}</Image>\n'


def write_series(store_path: Location) -> None:
    """Lists all committed photographs as OME-Zarr's bioformats2raw collection has it."""
    files = layout.open_store(store_path)
    for name, data in series(files).items():
        files.write(name, data)


def series(files: Files) -> dict[str, bytes]:
    """The files of that list, by name, as the commits want them."""
    names: list[str] = []
    images: list[str] = []
    for entry in sorted(files.entries("commits"), key=lambda entry: entry.name):
        facts = layout.read_commit(files, f"commits/{entry.name}")
        images.append(_ome_xml(len(names), facts))
        names.append(layout.attempt_name(facts["id"], facts["attempt"]))
    schema = "http://www.openmicroscopy.org/Schemas/OME/2016-06"
    xml = f'<?xml version="1.0" encoding="UTF-8"?>\n<OME xmlns="{schema}">\n{"".join(images)}</OME>\n'
    ome = {"ome": {"version": "0.5", "series": names}}
    group = layout.to_json({"zarr_format": 3, "node_type": "group", "attributes": ome})
    return {"OME/METADATA.ome.xml": xml.encode(), "OME/zarr.json": group}
