"""Each published form of a data set, in little: names, labels, patients, eyes, masks, and what is refused."""

import base64
import io
import os
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tilestream.store import Source, Store, ingest_photograph, write_labels
from tilestream.store.adapters import Adapter, Collection, read_collection
from tilestream.store.labels import Columns

XLS = (
    b"c-rk)J!lj`6#i!KE`KDKyO;zMAuIu-#vq7|O>!z|urS7?P(;wl-6T13f2^w*8>2C$AXq6jfiyNz8-GwiI}0JAg&+tQEv*CvizMrt"
    b"w|nPBugHN04f`$g=FOWoZ{F^kc{{tW7oz#u`|XSP1$_u$#i>PAiA+$bEi@vae#g;lp{}9g`1r3-TSI}Y3gJn^t7;uX9q&aLxEFju"
    b"6!=Kx6ml5IW|X;(IKVzgp?&BjDsY=5VYIPVO-$oVH!;1-nopVTW63q9y`-BLC$SJ4=-%tC;uA(E_l2SDKIAd)S+W}~c&S(MrR&1g"
    b"4Pn2Pl&OESqa#?4IZ)jCRYqAdl}9rLa1P%b6Zl%#sn1PczP@q+l7C+<uP!6MVFZCGIA?f)&rovR9CQObyo3v!PxYp(0}iL<m@+dm"
    b"t=fR2xp8}3rqbC|b}Sh;6DlVyJFPNy6c|!=GLy|odwkLyvt&ZGk}P?4!px4EX&FD4l9s6wDlN?rAa~ixQJP^`S?7~+MUoLMsndC$"
    b"^Fm}*UTEO`QcpC2M&_fuYa-<7(w#4Fj*JY(PP1f+eRtm&TlG!C!DT&y28X#Pz*P5i^N5{HudvlE%(pXbrnOFW*I<js9GYgGtK8c~"
    b"^Xy@~jcqI8w-Z0}`Pie5nNP7D#LxFHUTmI!7n?;VJ>&$9*Vi<9M31<2Q{!>0Pzx`+d|=x4Tc)WoBA)M#_gZYkvW^iU%G7P?rz46j"
    b"!+Tb4D?qJ)XG@f^CD>Nb(-&-uqJwATn_ydE)~I4z+KN%eic!>YTcuWvqDL+bpwDQ+1I<$Y{E0gF@ZrOU4<9~!_}EAgd^UB@<NCZA"
    b"^3M9z-hZ8CDl7hPk`0R?Wa+Z$!}K6BR9l#=X#KPzBnq~~8pjm=7it`**)2?9g#DPPc>U6sj3~XIH4lvZxh+)b{416C`IqPa0rk1$"
    b"r~"
)
"""What xlwt writes of the rows in `xlsx`, compressed."""


def xlsx() -> bytes:
    """A spreadsheet of two rows, with no more parts than there must be."""
    rows: list[list[object]] = [
        ["Image name", "Ophthalmologic department", "Retinopathy grade", "Risk of macular edema "],
        ["a.tif", "Service", 3, 1],
        ["b.tif", "Service", 0, 0],
    ]
    head, main = '<?xml version="1.0" encoding="UTF-8"?>', "http://schemas.openxmlformats.org/spreadsheetml/2006/main"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    package = "http://schemas.openxmlformats.org/package/2006"
    kinds = "application/vnd.openxmlformats-officedocument.spreadsheetml"

    def cell(value: object) -> str:
        text = f'<c t="inlineStr"><is><t xml:space="preserve">{value}</t></is></c>'
        return text if isinstance(value, str) else f"<c><v>{value}</v></c>"

    def related(kind: str, target: str) -> str:
        link = f'<Relationship Id="r1" Type="{office}/{kind}" Target="{target}"/>'
        return f'<Relationships xmlns="{package}/relationships">{link}</Relationships>'

    cells = "".join(f"<row>{''.join(map(cell, row))}</row>" for row in rows)
    parts = {
        "[Content_Types].xml": f'<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/xl/workbook.xml" ContentType="{kinds}.sheet.main+xml"/>'
        f'<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{kinds}.worksheet+xml"/></Types>',
        "_rels/.rels": related("officeDocument", "xl/workbook.xml"),
        "xl/workbook.xml": f'<workbook xmlns="{main}" xmlns:r="{office}"><sheets>'
        '<sheet name="S" sheetId="1" r:id="r1"/></sheets></workbook>',
        "xl/_rels/workbook.xml.rels": related("worksheet", "worksheets/sheet1.xml"),
        "xl/worksheets/sheet1.xml": f'<worksheet xmlns="{main}"><sheetData>{cells}</sheetData></worksheet>',
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, head + text)
    return file.getvalue()


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def found(collection: Collection) -> list[tuple[str, str, str | None]]:
    return [(source.id, source.name, source.problem) for source in collection.sources]


def column(collection: Collection, name: str) -> list[object]:
    assert collection.labels is not None
    return [None if pd.isna(value) else value for value in collection.labels[name]]


def check_types(collection: Collection) -> None:
    table = collection.labels
    assert table is not None
    assert list(table.columns[:4]) == ["id", "label", "patient", "eye"]
    assert table["label"].dtype == "Int64"
    assert table["eye"].dtype == "string"
    assert table["patient"].notna().all()


# published forms


def test_eyepacs(folder: Path) -> None:
    touch(folder, "train/10_left.jpeg", "train/10_right.jpeg", "train/9_left.jpeg")
    write(folder / "trainLabels.csv", "image,level\n10_left,0\n10_right,4\n9_left,2\n9_right,2\n")
    write(folder / "sampleSubmission.csv", "image,level\n1_left,0\n")  # as in Kaggle's archive
    read = read_collection(folder, "eyepacs")
    check_types(read)
    assert found(read) == [
        ("10_left", "train/10_left.jpeg", None),
        ("10_right", "train/10_right.jpeg", None),
        ("9_left", "train/9_left.jpeg", None),
        ("9_right", "9_right", "missing_file"),
    ]
    assert column(read, "label") == [0, 4, 2, 2]
    assert column(read, "patient") == ["10", "10", "9", "9"]
    assert column(read, "eye") == ["left", "right", "left", "right"]


def test_eyepacs_with_its_csv_elsewhere(folder: Path, tmp_path: Path) -> None:
    touch(folder, "10_left.jpeg")
    path = write(tmp_path / "retinopathy_solution.csv", "image,level,Usage\n10_left.jpeg,3,Public\n")
    read = read_collection(folder, "eyepacs", path)
    assert read.sources[0].path == str(folder / "10_left.jpeg")
    assert (column(read, "label"), column(read, "patient"), column(read, "eye")) == ([3], ["10"], ["left"])


def test_aptos(folder: Path) -> None:
    touch(folder, "train_images/000c1434d8d7.png")
    write(folder / "train.csv", "id_code,diagnosis\n000c1434d8d7,2\n")
    write(folder / "test.csv", "id_code\n0005cfc8afb6\n")
    read = read_collection(folder, "aptos")
    check_types(read)
    assert found(read) == [("000c1434d8d7", "train_images/000c1434d8d7.png", None)]
    assert (column(read, "label"), column(read, "eye")) == ([2], [None])


@pytest.mark.parametrize(
    "text",
    [
        "Image name,Retinopathy grade,Risk of macular edema ,,,,\nIDRiD_001,3,2,,,,\nIDRiD_002,0,0,,,,\n,,,,\n",
        "image,dr_grade,dme_risk,width,sha256,byte_identical_to\nIDRiD_001.jpg,3,2,9,ab,\nIDRiD_002.jpg,0,0,9,cd,\n",
    ],
    ids=["original", "shared"],
)
def test_idrid(folder: Path, text: str) -> None:
    touch(folder, "images/IDRiD_001.jpg", "images/IDRiD_002.jpg")
    write(folder / "labels.csv", text)
    read = read_collection(folder, "idrid")
    check_types(read)
    assert found(read) == [(f"IDRiD_00{i}", f"images/IDRiD_00{i}.jpg", None) for i in (1, 2)]
    assert column(read, "label") == [3, 0]
    assert column(read, "dme_risk") == [2, 0]


def test_another_column_may_be_the_label(folder: Path) -> None:
    write(folder / "labels.csv", "image,dr_grade,dme_risk,site\na.jpg,3,7,S1\n")
    read = read_collection(folder, "idrid", columns=Columns(label="dme_risk", patient="site"))
    assert column(read, "label") == [7]  # not held to the range of grades
    assert column(read, "patient") == ["S1"]


def test_messidor(folder: Path) -> None:
    touch(folder, "Base11/a.tif", "Base12/a.tif", "Base33/b.tif")
    header = "Image name,Ophthalmologic department,Retinopathy grade,Risk of macular edema \n"
    write(folder / "Annotation_Base11.csv", header + "a.tif,Service 1,3,1\n")
    write(folder / "Base12" / "Annotation Base12.csv", header + "a.tif,Service 1,0,0\nb.tif,Service 1,1,0\n")
    write(folder / "more" / "Annotation_Base33.csv", header + "b.tif,Service 2,2,2\n")
    write(folder / "Annotation_Base11.xls", "the CSV made of it is read instead")
    read = read_collection(folder, "messidor")
    check_types(read)
    assert sorted(found(read)) == [
        ("Base11/a", "Base11/a.tif", None),
        ("Base12/a", "Base12/a.tif", None),
        ("Base12/b", "Base12/b.tif", "missing_file"),
        ("Base33/b", "Base33/b.tif", None),
    ]
    assert read.labels is not None
    table = read.labels.set_index("id")
    assert table["label"].to_dict() == {"Base11/a.tif": 3, "Base12/a.tif": 0, "Base12/b.tif": 1, "Base33/b.tif": 2}
    assert table.loc["Base33/b.tif", "dme_risk"] == 2
    assert (table["patient"] == table.index).all()


def test_messidor_without_folders_of_bases(folder: Path) -> None:
    touch(folder, "a.tif")
    write(folder / "Annotation_Base11.csv", "Image name,Retinopathy grade\na.tif,3\n")
    assert found(read_collection(folder, "messidor")) == [("a", "a.tif", None)]


@pytest.mark.parametrize("kind", ["xls", "xlsx"])
def test_messidor_spreadsheets(folder: Path, kind: str) -> None:
    touch(folder, "Base11/a.tif", "Base11/b.tif")
    path = folder / f"Annotation_Base11.{kind}"
    path.write_bytes(xlsx() if kind == "xlsx" else zlib.decompress(base64.b85decode(XLS)))
    read = read_collection(folder, "messidor")
    assert found(read) == [("Base11/a", "Base11/a.tif", None), ("Base11/b", "Base11/b.tif", None)]
    assert column(read, "label") == [3, 0]
    assert column(read, "dme_risk") == [1, 0]
    path.write_bytes(b"no spreadsheet")
    with pytest.raises(ValueError, match=f"Annotation_Base11.{kind}' is no spreadsheet"):
        read_collection(folder, "messidor")


@pytest.mark.parametrize("kind", ["xls", "xlsx"])
def test_what_reads_spreadsheets_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setitem(sys.modules, "python_calamine", None)
    path = folder / f"Annotation_Base11.{kind}"
    path.touch()
    with pytest.raises(ValueError, match=r"pip install python-calamine, .* save the sheet as 'Annotation_Base11\.csv'"):
        read_collection(folder, "messidor")


@pytest.mark.parametrize("adapter", ["classes", "dr1", "dr2"])
def test_one_folder_a_class(folder: Path, adapter: Adapter) -> None:
    touch(folder, "normal/a.tif", "normal/deep/a.tif", "exudates/a.tif", "both.tif", "both.jpg", "top.tif", ".x/a.tif")
    read = read_collection(folder, adapter)
    check_types(read)
    assert read.labels is not None
    table = read.labels.set_index("id")
    assert table.index[table["label"].isna()].tolist() == ["both.jpg", "top.tif"]
    assert table["label"].dropna().to_dict() == {"exudates/a.tif": 0, "normal/a.tif": 1, "normal/deep/a.tif": 1}
    assert table["class"].dropna().to_dict() == {
        "exudates/a.tif": "exudates", "normal/a.tif": "normal", "normal/deep/a.tif": "normal",
    }  # fmt: skip
    assert ("both", "both.jpg", "ambiguous_name") in found(read)
    assert ("exudates/a", "exudates/a.tif", None) in found(read)


def test_folders_named_by_integers_are_the_labels(folder: Path) -> None:
    touch(folder, "0/a.jpg", "3/b.jpg", "10/c.jpg")
    read = read_collection(folder, "classes")
    assert dict(zip(column(read, "id"), column(read, "label"), strict=True)) == {
        "0/a.jpg": 0,
        "3/b.jpg": 3,
        "10/c.jpg": 10,
    }
    assert set(column(read, "class")) == {"0", "3", "10"}


def test_a_name_that_fits_no_table_is_left_to_the_quarantine(folder: Path, store: Path) -> None:
    touch(folder, "a/x.jpg")
    (folder / "a" / os.fsdecode(b"\xff.jpg")).touch()
    read = read_collection(folder, "classes")
    assert len(read.sources) == 2
    assert column(read, "id") == ["a/x.jpg"]
    assert read.labels is not None
    write_labels(store, read.labels)


# IDRiD's masks

MASKS = (
    "image,MA_mask,MA_pixels,SE_mask,SE_pixels,same_photo_as_grading,dr_grade_of_that_photo\n"
    "IDRiD_01.jpg,IDRiD_01_MA.png,6,,,IDRiD_102.jpg,2\n"
    "IDRiD_02.jpg,IDRiD_02_MA.png,9,IDRiD_02_SE.png,4,,\n"
)


def test_idrid_segmentation(folder: Path) -> None:
    touch(folder, *(f"images/IDRiD_0{i}.jpg" for i in (1, 2)))
    touch(folder, *(f"masks/IDRiD_0{name}.png" for name in ("1_MA", "2_MA", "2_SE")))
    write(folder / "labels.csv", MASKS)
    read = read_collection(folder, "idrid-segmentation")
    check_types(read)
    assert found(read) == [(f"IDRiD_0{i}", f"images/IDRiD_0{i}.jpg", None) for i in (1, 2)]
    masks = folder / "masks"
    assert [source.masks for source in read.sources] == [
        {"MA": str(masks / "IDRiD_01_MA.png")},
        {"MA": str(masks / "IDRiD_02_MA.png"), "SE": str(masks / "IDRiD_02_SE.png")},
    ]
    assert column(read, "MA_pixels") == [6, 9]
    assert column(read, "SE_pixels") == [None, 4]
    assert column(read, "label") == [2, None]
    assert column(read, "patient") == ["IDRiD_102", "IDRiD_02"]


def test_idrid_segmentation_by_names(folder: Path) -> None:
    touch(folder, "1. Original Images/a. Training Set/IDRiD_01.jpg", "1. Original Images/b. Testing Set/IDRiD_55.jpg")
    truths = "2. All Segmentation Groundtruths"
    touch(
        folder,
        f"{truths}/a. Training Set/1. Microaneurysms/IDRiD_01_MA.tif",
        f"{truths}/b/5. Optic Disc/IDRiD_01_OD.tif",
    )
    touch(folder, f"{truths}/b/5. Optic Disc/IDRiD_99_OD.tif")
    read = read_collection(folder, "idrid-segmentation")
    check_types(read)
    assert [(source.id, source.problem, sorted(source.masks)) for source in read.sources] == [
        ("IDRiD_01", None, ["MA", "OD"]),
        ("IDRiD_55", None, []),
        ("IDRiD_99", "missing_file", ["OD"]),
    ]
    assert column(read, "id") == ["IDRiD_01.jpg", "IDRiD_55.jpg"]


def test_a_photograph_without_its_mask_is_quarantined(folder: Path, tmp_path: Path) -> None:
    touch(folder, *(f"images/{name}.jpg" for name in "abcde"), "masks/a.png", "masks/b.png")
    touch(tmp_path, "secret.png")
    (folder / "masks" / "link.png").symlink_to(tmp_path / "secret.png")
    masks = ["a.png", "none.png", "../../secret.png", str(tmp_path / "secret.png"), "link.png"]
    rows = "".join(f"{name},{mask}\n" for name, mask in zip("abcde", masks, strict=True))
    write(folder / "labels.csv", "image,HE_mask\n" + rows)
    read = read_collection(folder, "idrid-segmentation")
    assert [source.problem for source in read.sources] == [
        None, "missing_mask", "outside_root", "outside_root", "outside_root",
    ]  # fmt: skip


def test_both_parts_of_idrid_are_tied_together(folder: Path) -> None:
    touch(
        folder, "grading/images/IDRiD_102.jpg", "segmentation/images/IDRiD_01.jpg", "segmentation/images/IDRiD_02.jpg"
    )
    touch(folder, *(f"segmentation/masks/IDRiD_0{name}.png" for name in ("1_MA", "2_MA", "2_SE")))
    write(folder / "grading" / "labels.csv", "image,dr_grade,dme_risk\nIDRiD_102.jpg,2,1\n")
    write(folder / "segmentation" / "labels.csv", MASKS)
    read = read_collection(folder, "idrid")
    check_types(read)
    assert found(read) == [
        ("IDRiD_102", "grading/images/IDRiD_102.jpg", None),
        ("IDRiD_01", "segmentation/images/IDRiD_01.jpg", None),
        ("IDRiD_02", "segmentation/images/IDRiD_02.jpg", None),
    ]
    assert column(read, "MA_pixels") == [None, 6, 9]
    assert column(read, "dme_risk") == [1, None, None]
    with pytest.raises(ValueError, match="ingest the folder grading alone"):
        read_collection(folder, "idrid", columns=Columns(label="dme_risk"))


# any CSV


def test_any_csv(folder: Path, tmp_path: Path) -> None:
    touch(folder, "x/1.png", "2.jpg", "unnamed.jpg")
    path = write(tmp_path / "l.csv", "file;no\n")
    with pytest.raises(ValueError, match=r"column 'image' is not in .*it has 'file;no'"):
        read_collection(folder, labels=path)
    write(path, "file,grade,who,side\nx/1,1,p,L\n2.jpg,,p,R\n")
    read = read_collection(folder, "csv", path, Columns("file", "grade", "who", "side"))
    check_types(read)
    assert found(read) == [("x/1", "x/1.png", None), ("2", "2.jpg", None)]
    assert (column(read, "label"), column(read, "patient"), column(read, "eye")) == (
        [1, None],
        ["p", "p"],
        ["left", "right"],
    )


def test_a_folder_alone(folder: Path) -> None:
    touch(folder, "a.jpg", "sub/b.png")
    read = read_collection(folder)
    assert read.labels is None
    assert found(read) == [("a", "a.jpg", None), ("sub/b", "sub/b.png", None)]


@pytest.mark.parametrize(
    ("adapter", "header"),
    [
        ("csv", "image"),
        ("eyepacs", "image,level"),
        ("aptos", "id_code,diagnosis"),
        ("idrid", "Image name,Retinopathy grade"),
        ("messidor", "Image name,Retinopathy grade"),
        ("idrid-segmentation", "image,MA_mask"),
    ],
)
def test_rows_that_leave_the_folder_do_not_stop_the_others(
    folder: Path, tmp_path: Path, store: Path, adapter: Adapter, header: str
) -> None:
    touch(tmp_path, "9_left.jpg")
    touch(folder, "1_left.jpg")
    (folder / "2_left.jpg").symlink_to(tmp_path / "9_left.jpg")
    (folder / "up").symlink_to(tmp_path)
    (folder / "3_left.jpg").mkdir()
    os.mkfifo(folder / "4_left.jpg")
    outside = ["../9_left", str(tmp_path / "9_left.jpg"), "x/../../9_left", "up/9_left", "2_left", "9_left\0.jpg"]
    ids = ["1_left", *outside, "8_left", "3_left.jpg", "4_left"]
    path = write(tmp_path / "l.csv", header + "\n" + "".join(f"{id}{',' * header.count(',')}\n" for id in ids))
    read = read_collection(folder, adapter, path)
    assert [source.problem for source in read.sources] == [
        None, *["outside_root"] * len(outside), "missing_file", None, None,
    ]  # fmt: skip
    reasons = [ingest_photograph(store, source)["reason"] for source in read.sources]
    assert reasons[1:] == [*["outside_root"] * len(outside), "missing_file", "not_a_file", "not_a_file"]
    assert read.labels is not None
    write_labels(store, read.labels)


# refusals


@pytest.mark.parametrize(
    ("adapter", "text", "message"),
    [
        ("eyepacs", "image,grade\n1_left,0\n", r"column 'level' is not in .*it has 'image', 'grade'"),
        ("eyepacs", "image,level\n1_middle,0\n", r"id='1_middle' tells no patient and eye .*--eye-column"),
        ("eyepacs", "image,level\n1_left,5\n", r"line 2: label=5 in column 'level' must be in \[0, 5\)"),
        ("aptos", "image,level\na,0\n", r"column 'id_code' is not in"),
        ("idrid", "name,grade\na,0\n", r"column 'image' is not in"),
        ("idrid", "image,dr_grade,dme_risk\na,0,x\n", r"line 2: dme_risk='x' .* is not an integer"),
        ("messidor", "Image name,Retinopathy grade\na.tif,4\n", r"label=4 .* must be in \[0, 4\)"),
        ("idrid-segmentation", "image,dr_grade\na,0\n", r"names no masks; it needs a column MA_mask"),
        ("csv", "image\na.jpg\na.png\n", r"id='a' occurs more than once"),
        ("classes", "image\na\n", r"adapter=classes takes labels from the names of folders"),
        ("apots", "image\na\n", r"adapter='apots' is unknown; use one of csv, classes"),
    ],
)
def test_a_csv_of_another_form(folder: Path, adapter: Adapter, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        read_collection(folder, adapter, write(folder / "l.csv", text))
    assert "\n" not in str(raised.value)


def test_missing_sheets(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds 0 CSV files that could be the labels; give one by --labels"):
        read_collection(folder, "eyepacs")
    touch(folder, "a.csv", "b.csv")
    with pytest.raises(ValueError, match="holds 2 CSV files"):
        read_collection(folder, "aptos")
    with pytest.raises(ValueError, match="holds no Annotation_BaseXX"):
        read_collection(folder, "messidor")
    with pytest.raises(ValueError, match="columns are named, but no labels"):
        read_collection(folder, columns=Columns(label="level"))
    with pytest.raises(FileNotFoundError, match=r"none\.csv"):
        read_collection(folder, "idrid", folder / "none.csv")
    with pytest.raises(NotADirectoryError):
        read_collection(tmp_path / "none", "classes")


def test_folders_that_are_no_classes(folder: Path, tmp_path: Path) -> None:
    touch(folder, "a.jpg")
    with pytest.raises(ValueError, match="holds no folders"):
        read_collection(folder, "classes")
    with pytest.raises(ValueError, match="holds neither a CSV nor masks"):
        read_collection(folder, "idrid-segmentation")
    touch(folder, "normal/a.jpg")
    touch(tmp_path, "elsewhere/a.jpg")
    (folder / "mild").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="mild' of a class holds no photographs"):
        read_collection(folder, "classes")


# into a store


def test_masks_and_columns_reach_the_store(folder: Path, store: Path, noise: Callable[..., np.ndarray]) -> None:
    truth = noise(channels=1) > 200
    for name in ("01", "02"):
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(noise(seed=int(name))).save(folder / "images" / f"IDRiD_{name}.jpg")
    (folder / "masks").mkdir()
    for name in ("01_MA", "02_MA", "02_SE"):
        Image.fromarray(truth).save(folder / "masks" / f"IDRiD_{name}.png")  # one bit
    write(folder / "labels.csv", MASKS)
    read = read_collection(folder, "idrid-segmentation")
    assert read.labels is not None
    write_labels(store, read.labels)
    for source in read.sources:
        assert ingest_photograph(store, source)["status"] == "committed"
    stored = Store(store)
    np.testing.assert_array_equal(stored.mask("IDRiD_02", "SE")[...], truth[None].astype(np.uint8))
    samples = stored.samples()
    assert samples["label"].tolist() == [2, pd.NA]
    assert samples["patient"].tolist() == ["IDRiD_102", "IDRiD_02"]
    assert stored.labels()["MA_pixels"].tolist() == [6, 9]


def test_masks_of_a_photograph_turned_by_exif_are_refused(
    folder: Path, store: Path, noise: Callable[..., np.ndarray]
) -> None:
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(noise()).save(folder / "a.jpg", exif=exif)
    Image.fromarray(noise(channels=1)).save(folder / "m.png")
    source = Source("a", str(folder / "a.jpg"))
    assert ingest_photograph(store, replace(source, masks={"MA": str(folder / "m.png")}))["reason"] == "bad_mask"
    assert ingest_photograph(store, source)["status"] == "committed"
