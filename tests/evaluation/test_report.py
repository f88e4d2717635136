import json
import re
from html.parser import HTMLParser

import pytest

from nla_jax.evaluation import report, report_plots

ATTACK = '</p><script>alert("x")</script><img src=x onerror=alert(1)>'


def fve(value, denominator=0.4321):
    return {
        "value": value,
        "low": value - 0.04,
        "high": value + 0.04,
        "n": 600,
        "documents": 97,
        "denominator": denominator,
    }


def line(name, group, reconstructor, value):
    figures = {"fve_nrm": fve(value), "fve": fve(value - 0.01, 123.4), "failed": fve(0.017, 1.0)}
    return {"name": name, "group": group, "labels": {"AR": reconstructor}, "figures": figures}


SYSTEMS = [
    line("explainer text", "gold", "own", 0.478),
    line("AV after RL", "nla", "judge", 0.216),
    line("AV after RL", "nla", "own", 0.257),
]
CONTROLS = [
    line("shuffled <activations> & $x", "control", "judge", -0.376),
    {
        "name": "training mean",
        "group": "control",
        "labels": {"AR": "-"},
        "figures": {"fve": fve(0.0), "fve_nrm": None},
    },
]


def table(name, rows, plotted="fve_nrm"):
    return {"name": name, "title": name.capitalize(), "note": f"On {name}.", "plotted": plotted, "rows": rows}


def at(place, name, group, reconstructor, value):
    whole = line(name, group, reconstructor, value)
    labels = whole["labels"] | ({"place": place} if place else {})
    return {**whole, "labels": labels, "figures": {"fve_nrm": fve(value)}}


BY_PLACE = [
    at("answer_start", "AV after RL", "nla", "own", 0.51),
    at("answer_start", "AV after RL", "nla", "judge", 0.48),
    at("inside", "AV after RL", "nla", "judge", 0.31),
    at("answer_start", "last token", "control", "-", 0.02),
    at("inside", "last token", "control", "-", 0.22),
]


def suite(*tables):
    return {"digest": "x", "seconds": 1.0, "tables": list(tables)}


def metrics_rows():
    yield from ({"stage": "ar_sft", "step": step, "loss": 1.6 / (1 + step)} for step in range(5))
    yield {"stage": "ar_sft", "step": 4, "held_out_fve_nrm": 0.4}
    yield {"stage": "av_sft", "step": 4, "loss": 3.1, "real_loss": 3.0, "shuffled_loss": 3.4, "gap": 0.4}
    for step in range(6):
        yield {
            "stage": "rl",
            "step": step,
            "reward_mean": -1 + 0.1 * step,
            "reward_std": 0.2,
            "kl": 0.1 * step,
        }
    yield {"stage": "rl", "step": 5, "judge_fve_nrm": 0.2, "own_fve_nrm": 0.3, "length_mean": None}


# AR loss and FVE, AV losses and gap, RL reward, KL and FVEs; nothing for the keys that no row has.
EXPECTED_CURVES = 7
# The systems, the controls, and the landscape that is made of both.
EXPECTED_BARS = 3


def write_run(directory):
    evaluation = {
        "run": {"model": "SmolLM2-135M", "layer": 20, "corpus": "Brown", "command": f"train {ATTACK}"},
        "settings": {"group_size": 8, "reward": "neg_mse"},
        "mean_is": "2376 training activations",
        "suites": {
            "reconstruction": suite(table("systems", SYSTEMS), table("empty", [])),
            "controls": suite(table("controls", CONTROLS), table("more", SYSTEMS[:1], plotted=None)),
        },
        "timings": {"extract": 42.0, "rl": 3723.0},
        "kept_steps": {"av_sft": 4, "ar_sft": 2, "rl": 4},
    }
    example = {
        "doc_id": "brown/ca01",
        "context_tail": "The Fulton County <Grand>",
        "next_tokens": " Jury said\u2028",
        "explanation": ATTACK,
        "explainer_text": "News & politics",
        "cosine": 0.8125,
        "rebuilt_by": "own",
        "failed": False,
    }
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics_rows()))
    (directory / "evaluation.json").write_text(json.dumps(evaluation))
    lines = [json.dumps({**example, "doc_id": f"doc-{i}"}, ensure_ascii=False) for i in range(25)]
    (directory / "examples.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return directory


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory):
    return report.write_report(write_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


class Page(HTMLParser):
    """Elements, attributes and visible text of a page; unclosed elements are an error."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.attributes, self.texts, self.open = [], [], [], []
        self.feed(html)
        assert not self.open
        self.text = re.sub(r"\s+", " ", " ".join(self.texts))

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)


@pytest.fixture
def page(html):
    return Page(html)


def test_every_number_is_in_the_page(page):
    for expected in (
        "0.216 [0.176, 0.256] of 0.4321",
        "−0.376 [−0.416, −0.336] of 0.4321",
        "600 activations from 97 held-out documents",
        "0.4321",
        "123.4000",
        "0.017",
        "SmolLM2-135M, residual stream after block 20",
        "Mean: 2376 training activations.",
        "group_size 8",
        "extract 42.0 s",
        "rl 1 h 2 min",
        "cosine 0.812",
    ):
        assert expected in page.text, expected


def test_tables_stand_under_their_suites(page):
    assert "Reconstruction: what comes back through each AR, and where Systems On systems." in page.text
    assert "Controls: controls, and baselines without a writer or reader Controls On controls." in page.text
    # A figure that a line does not have is a dash, and tables without lines are left out.
    assert "training mean - – 0.000" in page.text and "On empty." not in page.text


def test_what_models_and_users_wrote_is_text_only(page, html):
    assert not {"script", "img", "grand"} & set(page.elements)
    assert page.text.count('</p><script>alert("x")</script>') == report.EXAMPLES_SHOWN + 1
    assert "The Fulton County <Grand> Jury said" in page.text
    assert "shuffled <activations> & $x (judge)" in page.text
    assert "<script" not in html


def test_page_needs_nothing_but_itself(page, html):
    assert "http:" not in html and "https:" not in html and "@import" not in html
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href")]
    links += re.findall(r"url\((.*?)\)", html)
    assert links and all(link.startswith("#") for link in links)
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes


def test_one_svg_per_plot_that_has_data(page):
    assert page.elements.count("svg") == EXPECTED_CURVES + EXPECTED_BARS
    titles = [value for key, value in page.attributes if key == "aria-label"]
    assert "RL: reward" in titles and "RL: explanation length (tokens)" not in titles
    # Plots share one document: an id used twice would clip a curve with another plot's frame.
    clips = [value for key, value in page.attributes if key == "id" and re.fullmatch("p[0-9a-f]{10}", value)]
    assert len(clips) >= EXPECTED_CURVES and len(clips) == len(set(clips))


def test_examples_tell_their_places(run_dir):
    path = run_dir / "examples.jsonl"
    lines = [json.loads(text) for text in path.read_bytes().decode().rstrip("\n").split("\n")]
    path.write_text("".join(json.dumps({**row, "place": "answer_start"}) + "\n" for row in lines))
    page = Page(report.write_report(run_dir).read_text(encoding="utf-8"))
    assert "doc-3 answer start cosine 0.812" in page.text
    assert "drawn by a key, some of each place; the cosine" in page.text


def test_only_the_first_examples_are_shown(page):
    assert "doc-19" in page.text and "doc-20" not in page.text


def test_same_run_same_bytes(run_dir, html):
    assert report.write_report(run_dir).read_text(encoding="utf-8") == html


def test_a_minimal_evaluation_is_enough(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"suites": {"cost": suite(table("cost", CONTROLS[-1:], None))}})
    )
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert "training mean" in page.text and "Examples" not in page.text
    assert page.elements.count("svg") == 0


def test_curve_takes_the_later_of_two_rows_for_a_step():
    rows = [
        {"stage": "rl", "step": 2, "kl": 9.0},
        {"stage": "rl", "step": 1, "kl": 0.1},
        {"stage": "rl", "step": 2, "kl": 0.2},
        {"stage": "rl", "step": 3, "kl": None},
        {"stage": "ar_sft", "step": 4, "kl": 7.0},
    ]
    assert report_plots.curve(rows, "rl", "kl") == ([1, 2], [0.1, 0.2])


def test_a_metrics_line_cut_short_is_tolerated_at_the_end_alone(run_dir):
    path = run_dir / "metrics.jsonl"
    rows = report.read_metrics(run_dir)
    whole = path.read_text()
    path.write_text(whole + '{"stage": "rl", "st')
    assert report.read_metrics(run_dir) == rows
    path.write_text('{"stage": "rl", "st\n' + whole)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 1 is not a JSON object .* delete that line"):
        report.write_report(run_dir)


def test_missing_or_broken_files_name_the_command_to_run(run_dir):
    path = run_dir / "evaluation.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"holds no suites .* delete it and measure again \(`nla evaluate /"):
        report.write_report(run_dir)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"not valid JSON .* delete it and measure again \(`nla evaluate /"):
        report.write_report(run_dir)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"evaluation\.json does not exist.*`nla evaluate /"):
        report.write_report(run_dir)
    (run_dir / "metrics.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl does not exist.*`nla train CONFIG`"):
        report.read_metrics(run_dir)


def test_overview_is_one_picture_with_the_controls(run_dir, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        report, "draw_table", lambda ax, table: drawn.extend(row["name"] for row in table["rows"])
    )
    path = report.save_overview(run_dir, tmp_path / "docs" / "pictures")
    assert path.read_bytes().startswith(b"\x89PNG") and path.name == "overview.png"
    assert drawn == ["AV after RL", "shuffled <activations> & $x", "training mean"]


def test_a_table_of_places_is_a_matrix():
    matrix = report.by_place(
        table("systems_by_place", [at("", "AV after RL", "nla", "judge", 0.4), *BY_PLACE])
    )
    assert matrix["figure"] == "fve_nrm"
    assert matrix["places"] == {"all": 600, "answer_start": 600, "inside": 600}
    found = [
        (row["name"], row["labels"], {place: figure["value"] for place, figure in row["figures"].items()})
        for row in matrix["lines"]
    ]
    assert found == [
        ("AV after RL", {"AR": "judge"}, {"all": 0.4, "answer_start": 0.48, "inside": 0.31}),
        ("AV after RL", {"AR": "own"}, {"answer_start": 0.51}),
        ("last token", {"AR": "-"}, {"answer_start": 0.02, "inside": 0.22}),
    ]
    assert report.by_place(table("systems", SYSTEMS)) is None
    several = [{**row, "figures": {**row["figures"], "bits": fve(9.0)}} for row in BY_PLACE]
    assert report.by_place(table("copying", several)) is None


@pytest.fixture
def run_by_place(run_dir):
    path = run_dir / "evaluation.json"
    evaluation = json.loads(path.read_text())
    evaluation["suites"]["reconstruction"]["tables"].append(table("systems_by_place", BY_PLACE))
    path.write_text(json.dumps(evaluation))
    return run_dir


def test_figures_by_place_stand_side_by_side_in_the_page(run_by_place):
    page = Page(report.write_report(run_by_place).read_text(encoding="utf-8"))
    assert "fve_nrm at each place AR answer start n 600 inside n 600" in page.text
    assert "AV after RL judge 0.480 [0.440, 0.520] 0.310 [0.270, 0.350]" in page.text
    assert "AV after RL own 0.510 [0.470, 0.550] –" in page.text
    assert page.elements.count("svg") == EXPECTED_CURVES + EXPECTED_BARS + 1


def test_bars_by_place_are_those_of_the_judge(run_by_place, tmp_path, monkeypatch):
    drawn = {}

    def draw(ax, table):
        report_plots.draw_places(ax, table)
        drawn.update({bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers})
        drawn["places"] = [label.get_text() for label in ax.get_xticklabels()]

    monkeypatch.setattr(report, "draw_places", draw)
    report.save_overview(run_by_place, tmp_path)
    assert drawn == {
        "AV after RL": [0.48, 0.31],
        "last token": [0.02, 0.22],
        "places": ["answer start", "inside"],
    }


def test_lines_of_one_group_have_colors_of_their_own():
    shades = report_plots._shades(["gold", "nla", "nla", "control"])
    assert len(set(shades)) == 4
    assert shades[2] == pytest.approx(report_plots.to_rgb(report_plots.GROUPS["nla"][1])) and sum(
        shades[1]
    ) > sum(shades[2])


def test_a_figure_over_another_number_of_things_has_its_own_n(tmp_path):
    claims = line("detail", "nla", "own", 0.3)
    claims["figures"]["true"] = {**fve(0.5), "n": 411}
    write_run(tmp_path)
    evaluation = json.loads((tmp_path / "evaluation.json").read_text())
    evaluation["suites"] = {"faithfulness": suite(table("claims", [claims]))}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    page = Page(report.write_report(tmp_path).read_text(encoding="utf-8"))
    assert page.text.count("n 411") == 1 and "n 600" not in page.text


def test_examples_say_what_their_figures_are(page):
    assert "drawn by a key; the cosine is that of the vector which the own AR rebuilds" in page.text


def test_texts_over_training_stand_in_the_page(run_dir):
    rows = [{"id": "doc@60", "place": "line_end", "context_tail": "<b>", "writer_text": "It lists."}]
    texts = (("It ends.", 0.25), ("It <i>stops.", 0.5), (None, None))
    lines = [
        {"stage": "rl", "step": 4 * i, "rows": [rows[0] | {"text": text, "cosine": cosine}]}
        for i, (text, cosine) in enumerate(texts)
    ]
    (run_dir / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    html = report.write_report(run_dir).read_text(encoding="utf-8")
    page = Page(html)
    assert "How texts changed What the AV wrote about 1 held-out activations" in page.text
    assert (
        "doc@60 line end <b> Step Cosine Text writer It lists. 0 0.25 It ends. 4 0.50 It <i>stops."
        in page.text
    )
    assert "8 – (none could be read)" in page.text and "It <mark>&lt;i&gt;stops.</mark>" in html


def test_a_run_that_kept_no_texts_has_no_section_of_them(page):
    assert "How texts changed" not in page.text


def test_what_training_does_not_change_is_a_dashed_line(run_dir):
    with (run_dir / "metrics.jsonl").open("a") as file:
        for step in (0, 4):
            row = {"stage": "rl", "step": step, "repeated": 0.1, "writer_repeated": 0.02}
            file.write(json.dumps(row | {"judge_fve_nrm_turn_end": 0.4}) + "\n")
    html = report.write_report(run_dir).read_text(encoding="utf-8")
    assert "said twice by the writer" in html and "shared by the writer" not in html
    assert "RL: FVE by place, through the judge" in html and "turn end" in html
