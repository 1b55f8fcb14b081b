"""The page: self-contained, escaped, written whole or not at all."""

import base64
import hashlib
import os
import re
import stat
from html.parser import HTMLParser

import cv2
import jinja2
import numpy as np
import pytest

from tilestream import report
from tilestream.report import page

HOSTILE = '<script>alert("id")</script>'


def picture(height: int = 6, width: int = 9, ending: str = ".png", **kwargs) -> report.Picture:
    data = cv2.imencode(ending, np.zeros((height, width, 3), np.uint8))[1].tobytes()
    return report.Picture(data, alt=kwargs.pop("alt", "a black picture"), **kwargs)


def everything(text: str = "text") -> list[report.Section]:
    """A section with one item of each type, `text` wherever a text can stand."""
    table = report.Table([text, "count"], [[text, 35126], ["b", None]], caption=text, title=text)
    card = report.Card(text, [picture(ending=".jpg", alt=text, caption=text)], {text: text}, tone="bad")
    items = [report.KeyFigures({text: text}), table, picture(caption=text, alt=text), picture(chart=True)]
    return [
        report.Section(text, text, [*items, report.Gallery([card]), report.Code(text, text)]),
        report.Section("Second"),
    ]


class Tags(HTMLParser):
    """Every tag with its attributes, tags left open, and the text between."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.stack: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text += data if self.stack and self.stack[-1] not in ("script", "style") else ""

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def test_page_is_self_contained_and_well_formed():
    html = report.render_page("Title", everything(), summary="s", facts={"run": "1"}, footer="f")
    tags = Tags(html)
    assert tags.stack == []
    for _, attributes in tags.tags:
        for name in ("src", "href", "action", "srcset", "poster", "data"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#"))
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "@import" not in html
    assert not tags.named("link")


def test_policy_names_exactly_the_style_and_script_that_stand_there():
    html = report.render_page("Title", everything())
    policy = next(meta["content"] for meta in Tags(html).named("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'; img-src data:;")
    for tag in ("style", "script"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert "style=" not in html  # an inline style would be blocked


def test_every_text_is_escaped():
    html = report.render_page(HOSTILE, everything(HOSTILE), summary=HOSTILE, facts={HOSTILE: HOSTILE}, footer=HOSTILE)
    assert HOSTILE not in html
    tags = Tags(html)
    assert len(tags.named("script")) == 1
    assert tags.text.count(HOSTILE) == 6 + 3 + 13  # the page itself, its section, the items
    assert [image["alt"] for image in tags.named("img")].count(HOSTILE) == 2


def test_page_is_accessible():
    tags = Tags(report.render_page("Title", everything()))
    assert tags.named("html") == [{"lang": "en"}]
    assert [header["scope"] for header in tags.named("th")] == ["col", "col", "row", "row"]
    *shown, viewer = tags.named("img")
    assert all(image["alt"] for image in shown)
    assert viewer == {"alt": ""}  # the script gives it the alt text of the picture that it enlarges
    assert all(button.get("aria-label") for button in tags.named("button"))
    targets = {attributes["id"] for _, attributes in tags.tags if "id" in attributes}
    assert {link["href"].removeprefix("#") for link in tags.named("a")} <= targets


def test_pictures_keep_their_bytes_and_size():
    shown = picture(6, 9, ".jpg")
    assert shown.uri.startswith("data:image/jpeg;base64,")
    assert base64.b64decode(shown.uri.partition(",")[2]) == shown.data
    assert (shown.height_px, shown.width_px) == (6, 9)
    assert (picture(300, 1234).height_px, picture(300, 1234).width_px) == (300, 1234)
    html = report.render_page("Title", [report.Section("a", items=[picture(60, 90), picture(60, 90, chart=True)])])
    images = Tags(html).named("img")
    assert [(image.get("width"), image.get("height")) for image in images[:2]] == [("90", "60"), ("45", "30")]


def test_bad_items_are_refused():
    with pytest.raises(ValueError, match=r"data=b'GIF89a'... \(6 bytes\) is neither PNG nor JPEG"):
        report.Picture(b"GIF89a", alt="a")
    with pytest.raises(ValueError, match="neither PNG nor JPEG"):
        report.Picture(picture(ending=".jpg").data[:20], alt="cut short")
    with pytest.raises(ValueError, match="alt=' ' is empty"):
        report.Picture(picture().data, alt=" ")
    with pytest.raises(ValueError, match=r"rows\[1\] has 1 cells, the table 2 columns"):
        report.Table(["a", "b"], [[1, 2], [3]])


def test_numbers_are_formatted_and_aligned():
    rows = [["grade 0", 25810, 0.77142, "0.893 (0.816–0.941)", True], ["grade 1", None, -1.5, "–", "no"]]
    table = report.Table(["a", "b", "c", "d", "e"], rows)
    assert table.cells == [
        ["grade 0", "25,810", "0.771", "0.893 (0.816–0.941)", "True"],
        ["grade 1", "–", "−1.500", "–", "no"],
    ]
    assert report.as_text(float("nan")) == "–"
    assert report.as_text(1804.25, digits=1) == "1,804.2"
    assert report.as_text(np.int64(-1349)) == "−1,349"
    assert report.as_text(np.float32(0.25)) == "0.250"
    assert table.numeric == [False, True, True, False, False]  # a lone dash typed as text is text
    html = report.render_page("Title", [report.Section("a", items=[table])])
    assert '<td class="number">25,810</td>' in html
    assert '<th scope="row">grade 0</th>' in html
    assert report.Table(["a"], []).numeric == [False]
    assert report.Table(["a", "b"], [["−0.6 (−0.9 to −0.3)", "1 tom"]]).numeric == [True, False]


def test_neighbouring_pictures_share_a_row():
    section = report.Section("a", items=[picture(), picture(), report.Code("c"), picture()])
    assert [(kind, len(items)) for kind, items in section.blocks] == [("Picture", 2), ("Code", 1), ("Picture", 1)]
    assert report.render_page("Title", [section]).count('<div class="pictures">') == 2


def test_write_page_is_repeatable_and_replaces(tmp_path):
    path = tmp_path / "report.html"
    report.write_page(path, "Old", [])
    report.write_page(path, "Title", everything("naïve \udcff"))
    first = path.read_bytes()
    assert "naïve \\udcff" in first.decode("utf-8")  # an undecodable byte of a file name is shown, not fatal
    report.write_page(path, "Title", everything("naïve \udcff"))
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # readable to others, as a private temporary would not be


def test_a_failing_render_leaves_the_old_page(tmp_path):
    path = tmp_path / "report.html"
    report.write_page(path, "Old", [])
    before = path.read_bytes()
    with pytest.raises(jinja2.UndefinedError):
        report.write_page(path, "New", [object()])
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_page(tmp_path, monkeypatch, failing):
    path = tmp_path / "report.html"
    report.write_page(path, "Old", [])
    before = path.read_bytes()
    seen = []

    def fail(*_):
        seen.extend(entry.parent for entry in tmp_path.iterdir())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(page.os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        report.write_page(path, "New", [])
    assert seen == [tmp_path, tmp_path]  # the part stood beside the page, on the same file system
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_code_is_folded_under_its_summary():
    html = report.render_page("Title", [report.Section("a", items=[report.Code("open"), report.Code("shut", "name")])])
    assert html.count("<details>") == 1
    assert "<details><summary>name</summary><pre tabindex" in html
