"""The page as a file: record text stays text, whatever it holds, and nothing is fetched."""

import csv
import html.parser
import io
import json
import re

import pytest

from tests.core.fake_records import failure, record
from vitcmp.report import html as page_of
from vitcmp.report.csv_table import csv_table
from vitcmp.report.html import render_html
from vitcmp.report.output import write_text
from vitcmp.report.payload import make_payload, rows_of

EVIL = "</script><img src=x onerror=alert(1)>"
ODD = "a\u2028b\u2029c <!-- d --> <!-- vitcmp:scripts --> & \ud800 \x00 ]]> 日本"


class Tags(html.parser.HTMLParser):
    """Collects the tags of a page, and the text of each script by its id."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.scripts, self.id = [], {}, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.id = dict(attributes).get("id", tag) if tag == "script" else self.id

    def handle_endtag(self, tag):
        self.id = None if tag == "script" else self.id

    def handle_data(self, data):
        if self.id:
            self.scripts[self.id] = self.scripts.get(self.id, "") + data


def evil_records():
    records = [record("jax", at_s=5), failure(message=ODD, model="resnet50")]
    records[0]["case"]["model"] = EVIL
    records[0]["case"]["framework_version"] = "<!--<script>"
    records[0]["environment"] = {"cpu": EVIL, "flags": {EVIL: ODD}}
    return records


def test_record_text_stays_text_and_makes_no_tag():
    plain, evil = (
        render_html(make_payload([record("jax"), failure(model="resnet50")])),
        render_html(make_payload(evil_records(), name=EVIL, title=EVIL)),
    )
    assert Tags(evil).tags == Tags(plain).tags and "img" not in Tags(evil).tags
    assert evil.count("</script") == plain.count("</script") and evil.count("<!--") == plain.count("<!--")
    assert not re.search("[\u2028\u2029\ud800-\udfff]", evil)
    payload = json.loads(Tags(evil).scripts["payload"])
    rows = rows_of(payload)
    assert rows[-1]["model"] == EVIL and payload["title"] == payload["sources"][0]["name"] == EVIL
    message = next(row["message"] for row in rows if row["status"] == "oom")
    assert message == f"MemoryError: {ODD}"
    evil.encode()


def test_every_placeholder_is_filled_once_and_nothing_is_fetched():
    page = render_html(make_payload(evil_records()))
    assert "<!-- vitcmp:" not in page
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', page)[1]
    assert "default-src 'none'" in policy and "connect-src" not in policy
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", outside) and "@import" not in outside


def test_equal_records_give_equal_pages():
    assert render_html(make_payload(evil_records())) == render_html(make_payload(evil_records()))


@pytest.mark.parametrize("text", ["x </SCRIPT> y", "a <!-- b"])
def test_an_asset_that_would_end_its_script_is_refused(monkeypatch, text):
    monkeypatch.setattr(page_of, "_read", lambda name: text)
    with pytest.raises(ValueError, match="core.js has what ends the script"):
        page_of._script("core.js")


def cells(payload):
    return list(csv.DictReader(io.StringIO(csv_table(payload))))


def test_csv_has_a_row_for_each_setting_with_units_in_the_header():
    records = [record("jax", 10.0, batch_size=4), failure("torch", image_size="96x160")]
    ok, failed = sorted(cells(make_payload(records)), key=lambda row: row["status"])
    assert ok["latency_s"] == "0.01" and ok["images_per_s"] == "500.0" and ok["image_size_px"] == "224"
    assert ok["forward_flops_per_image"] == "2507366000" and ok["activation_peak_bytes"] == "12300000"
    assert failed["status"] == "oom" and failed["latency_s"] == failed["images_per_s"] == ""
    assert (failed["height_px"], failed["width_px"]) == ("96", "160")
    for name in ok:
        has_unit = re.search(r"_(s|px|bytes|flops|per_image|per_step|per_s|images|px|size)$|^(num|is|share)_", name)
        assert has_unit or not re.fullmatch(r"[-+0-9.e]+", ok[name] or "x") or name == "framework_version", name


@pytest.mark.parametrize(
    ["text", "cell"],
    [
        ("=1+1", "'=1+1"),
        ("+1", "'+1"),
        ("-2", "'-2"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("\t=1", "' =1"),
        ("  =1", "'  =1"),
        ("\uff1dcmd", "'\uff1dcmd"),
        ("\ufeff=1", "'\ufeff=1"),
        ("a\r\n=1", "a  =1"),
        ("a;=1", "a;'=1"),  # where lists are separated by semicolons
        ("a, -1", "a, '-1"),
        ("a\u2028=1", "a =1"),
        ('a,"b"', 'a,"b"'),
        ("vit_b16:pool=gap", "vit_b16:pool=gap"),
    ],
)
def test_a_cell_that_a_spreadsheet_would_take_for_a_formula_is_made_harmless(text, cell):
    one = record("jax")
    one["case"]["model"] = text
    [row] = cells(make_payload([one]))
    assert row["model"] == cell and row["num_threads"] == "2"


def test_a_file_is_replaced_whole_or_stays_as_it_was(tmp_path):
    path = tmp_path / "report.html"
    write_text(str(path), "old")
    write_text(str(path), "half of a pair: \ud800")
    assert path.read_bytes() == b"half of a pair: \\ud800"
    with pytest.raises(OSError):
        write_text(str(tmp_path / "absent" / "report.html"), "new")
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
