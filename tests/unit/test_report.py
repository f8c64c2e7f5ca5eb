"""Figures, the HTML page and the README's tables."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flux_attention import report
from flux_attention.report import Point, RouteRow, Section, Table

ROWS = [RouteRow("first", [True, False, True], [0.9, 0.2, 0.7]), RouteRow("second", [False, False, True])]
PLOTS = {
    "routes": lambda: report.route_heat_map(ROWS),
    "needles": lambda: report.needle_map({(1024, 0.0): [1.0], (1024, 1.0): [0.0, 1.0], (4096, 0.55): [1.0]}),
    "pareto": lambda: report.pareto(
        [Point("router", 0.7, 0.9, 0.8, 0.95, True), Point("static", 0.7, 0.8), Point("static", 0.8, 0.6)], "accuracy"
    ),
}


@pytest.mark.parametrize("name", PLOTS)
def test_a_figure_is_inline_svg_and_png(name, tmp_path):
    drawing = report.svg(PLOTS[name](), "a <description>")
    root = ElementTree.fromstring(drawing)
    assert root.attrib["aria-label"] == "a <description>"
    assert "currentColor" in drawing and report._INK not in drawing
    # Names of parts stay unique when two figures share a page.
    identifiers = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
    assert len(set(identifiers)) == len(identifiers) and all(i.startswith("f") for i in identifiers)
    assert drawing == report.svg(PLOTS[name](), "a <description>")
    report.save_image(PLOTS[name](), tmp_path / "new" / "figure.png")
    assert (tmp_path / "new" / "figure.png").stat().st_size > 1000


def test_empty_figures_are_refused():
    for make in (report.route_heat_map, lambda x: report.pareto(x, "y"), report.needle_map):
        with pytest.raises(ValueError, match="at least one"):
            make([] if make is not report.needle_map else {})


def test_ramp_ends_where_it_should():
    assert report.ramp(0) == report.RAMP[0] and report.ramp(1) == report.RAMP[-1]
    assert report.ramp(-1) == report.ramp(0) and report.ramp(2) == report.ramp(1)


def test_page_is_self_contained_and_escapes():
    section = Section(
        "Routes & <more>",
        "text",
        routes=ROWS,
        quotes=[("answer", "<script>alert(1)</script>")],
        table=Table(("", "a"), [("x", "1"), ("y", "2")], strong=1),
        figures=[(report.svg(PLOTS["routes"](), "routes"), "caption")],
        note="note",
    )
    page = report.render("Title", "Lead", [("label", "70 %")], [section], "foot")
    assert "<script>" not in page and "&lt;script&gt;" in page and "Routes &amp; &lt;more&gt;" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://www.w3.org", "").replace(
        "http://purl.org", ""
    ).replace("http://creativecommons.org", "").replace("https://matplotlib.org", "")
    assert page.count("<i") >= 6 and 'class="strong"' in page


def test_markdown_table():
    table = Table(("", "value", "lead"), [("a", "1", "2"), ("b", "2", "")], strong=1)
    assert table.markdown() == "|  | value | lead |\n|---|---:|---:|\n| a | 1 | 2 |\n| **b** | **2** |  |"


RESULTS = {
    "device": "GPU X",
    "commit": "abc",
    "date": "2026-01-02T00:00:00+00:00",
    "figures": [
        {"name": "needle1_4k_vs_dense", "value": 0.98, "unit": "ratio", "n": 200, "low": 0.95, "high": 1.0},
        {"name": "prefill_speedup_128k_q75", "value": 2.5, "unit": "×"},
    ],
}
README = "Intro\n<!-- figures:method -->\nold 0.1\n<!-- end -->\nmiddle\n<!-- figures:speed -->\n<!-- end -->\n"


def test_tables_are_left_alone_where_there_are_no_files(tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(README)
    assert report.main(["readme", str(page)]) == 2 and "no benchmarks/results above it" in capsys.readouterr().err
    assert page.read_text() == README
    assert report.main(["readme", str(tmp_path / "nothing.md")]) == 2 and "no such file" in capsys.readouterr().err


def test_readme_tables_are_written_from_the_files(tmp_path):
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    (folder / "x.json").write_text(json.dumps(RESULTS))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert report.main(["readme", str(readme)]) == 0
    text = readme.read_text()
    assert "0.980 | 0.950 – 1.000 | 200" in text and "2.50×" in text and "old 0.1" not in text
    assert "GPU X, commit abc, 2026-01-02" in text
    assert text.startswith("Intro\n") and "\nmiddle\n" in text
    assert report.main(["readme", str(readme)]) == 0 and readme.read_text() == text


def test_readme_without_figures_says_so_and_unknown_tables_are_named():
    assert "Not measured yet" in report.fill_readme(README, {})
    with pytest.raises(ValueError, match=r"unknown table 'x'"):
        report.fill_readme("<!-- figures:x -->\n<!-- end -->", {})


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", ["README.md", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("docs/*/*.md")))])
def test_the_projects_tables_are_up_to_date(path):
    if not (ROOT / path).is_file():
        pytest.skip("installed without the checkout")
    text = (ROOT / path).read_text(encoding="utf-8")
    results = report.read_results(ROOT / report.RESULTS)
    assert report.fill_readme(text, results) == text, f"run: python -m flux_attention.report readme {path}"


def test_usage_error(capsys):
    assert report.main([]) == 2
    assert "usage" in capsys.readouterr().err
