"""The dashboard and the alarms of docker/monitoring ask for what a server exports, and the alarms sound."""

from __future__ import annotations

import itertools
import json
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("promql_parser", reason="promql-parser reads PromQL")
pytest.importorskip("yaml", reason="PyYAML is not installed")

import yaml
from prometheus_client.parser import text_string_to_metric_families

from asag_deploy import Detector
from support import monitored_run
from support.promql import Known, WrongQueryError, labels_of
from support.served import GatedDetector, Served, in_threads, png, serving, until
from support.tiny_bundle import make_bundle, picture

ROOT = Path(__file__).parents[3]
MONITORING = ROOT / "docker" / "monitoring"
DASHBOARD: dict[str, Any] = json.loads((MONITORING / "dashboards" / "asag.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = DASHBOARD["panels"]
SHOWN = [panel for panel in PANELS if panel["type"] != "row"]
ALARMS: dict[str, Any] = yaml.safe_load((MONITORING / "alerts.yml").read_text(encoding="utf-8"))
RULES: list[dict[str, Any]] = [rule for group in ALARMS["groups"] for rule in group["rules"]]
OF_DASHBOARDS = {"$job": ".*", "$instance": ".*", "$window": "5m", "$__rate_interval": "1m"}
WIDTH = 24


def filled(expression: str) -> str:
    """An expression as Grafana sends it, with what its variables stand for."""
    for name, value in OF_DASHBOARDS.items():
        expression = expression.replace(name, value)
    return expression


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, frozenset[str]]]:
    """Every metric of servers that have answered, refused and failed, with its labels and their values."""
    seen: dict[str, dict[str, set[str]]] = {"up": {}}
    bundle = make_bundle(tmp_path_factory.mktemp("served") / "bundle")
    image = png(picture(4, 2))
    with Detector.load(bundle) as real, serving(real, connections=4) as server:
        for query, status in (("", 200), ("?deadline_ms=0.001", 503), ("?max_level=P9", 400)):
            assert server.detect(image, query)[0] == status
        server.ask("POST", "/v2/models/tiny/infer", b"{}")
        for path in ("/health", "/v2/health/ready"):
            assert server.ask("GET", path)[0] == 200
        read(server, seen)
        read(server, seen)  # it counts itself once it has been answered
    gated = GatedDetector()
    with serving(gated, requests=1, queue=0, queue_seconds=1) as server:
        gated.gate.clear()
        threads, _ = in_threads(1, lambda: server.detect(image))
        until(lambda: gated.running == 1)
        assert server.detect(image)[0] == 503
        gated.gate.set()
        threads[0].join()
        gated.error = RuntimeError("broken")
        assert server.detect(image)[0] == 500
        read(server, seen)
    # A connection and a wait that are refused take a crowd and seconds to bring about; the words are there.
    source = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "asag_deploy/serving").glob("*.py"))
    for reason in ("too_many_connections", "no_time"):
        assert f'"{reason}"' in source
        seen["asag_refusals_total"]["reason"].add(reason)
    return {name: {key: frozenset(v) for key, v in labels.items()} for name, labels in seen.items()}


def read(server: Served, seen: dict[str, dict[str, set[str]]]) -> None:
    """Add what `/metrics` says now."""
    status, text, _ = server.ask_plainly("GET", "/metrics")
    assert status == 200
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            labels = seen.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)


def targets() -> Iterator[tuple[str, dict[str, Any]]]:
    for panel in SHOWN:
        for target in panel["targets"]:
            yield panel["title"], target


def test_every_panel_asks_for_what_the_server_exports(exported: Known) -> None:
    found = list(targets())
    assert len(found) > 30
    for title, target in found:
        labels = labels_of(filled(target["expr"]), exported)
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert named <= labels, title
        assert "$" not in filled(target["expr"]), title


def test_lines_of_a_panel_have_names_of_their_own(exported: Known) -> None:
    """A legend leaves out no label that tells two lines apart."""
    for title, target in targets():
        if target.get("format") == "table":
            continue
        labels = labels_of(filled(target["expr"]), exported) - {"job"}
        assert labels == set(re.findall(r"{{(\w+)}}", target["legendFormat"])), title


def test_every_alarm_asks_for_what_the_server_exports(exported: Known) -> None:
    known = dict(exported)
    for rule in RULES:
        labels = labels_of(rule["expr"], known)
        if "record" in rule:
            known[rule["record"]] = {name: frozenset() for name in labels}
        else:
            said = " ".join(rule["annotations"].values())
            assert set(re.findall(r"\$labels\.(\w+)", said)) <= labels, rule["alert"]
            assert rule["labels"]["severity"] in ("warning", "critical")
            assert {"summary", "description"} == set(rule["annotations"])


def test_variables_and_annotations_ask_for_what_there_is(exported: Known) -> None:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            asked = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert asked is not None
            assert asked[2] == variable["name"]
            assert asked[2] in labels_of(filled(asked[1]), exported)
    for annotation in DASHBOARD["annotations"]["list"]:
        labels = labels_of(filled(annotation["expr"]), exported)
        assert set(re.findall(r"{{(\w+)}}", annotation["textFormat"])) <= labels


@pytest.mark.parametrize(
    "expression",
    [
        "sum(rate(asag_exit_levels_total[5m]))",
        'asag_exit_level_total{level="P2"}',
        'asag_exit_level_total{kind="P3"}',
        'asag_refusals_total{reason=~"busy|tired"}',
        "sum by (stage) (rate(asag_exit_level_total[5m]))",
        "histogram_quantile(0.5, sum(rate(asag_patches_bucket[5m])))",
        "sum by (level) (asag_exit_level_total) / sum(asag_exit_level_total)",
        "sum by (level) (asag_exit_level_total) / ignoring (level) sum(asag_exit_level_total)",
        "sum(rate(asag_patches_sum[5m])",
        "rate(asag_patches_sum)",
        "1",
    ],
)
def test_what_is_wrong_is_noticed(exported: Known, expression: str) -> None:
    with pytest.raises(WrongQueryError):
        labels_of(expression, exported)


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    ids = [panel["id"] for panel in PANELS]
    assert len(set(ids)) == len(ids)
    assert DASHBOARD["id"] is None
    assert DASHBOARD["uid"]
    for panel in PANELS:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= WIDTH
        assert min(place.values()) >= 0
        assert panel["title"]
    for panel in SHOWN:
        refs = [target["refId"] for target in panel["targets"]]
        assert len(set(refs)) == len(refs) > 0
        assert panel["description"].endswith(".")
    for one, other in itertools.combinations(PANELS, 2):
        assert not overlap(one["gridPos"], other["gridPos"]), (one["title"], other["title"])
    named = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    builtin = {"__rate_interval", "__all"}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))
    assert named - {"datasource"} <= used <= named | builtin


def overlap(one: dict[str, int], other: dict[str, int]) -> bool:
    return (
        one["x"] < other["x"] + other["w"]
        and other["x"] < one["x"] + one["w"]
        and one["y"] < other["y"] + other["h"]
        and other["y"] < one["y"] + one["h"]
    )


def test_everything_is_asked_of_the_source_that_is_provisioned() -> None:
    folder = MONITORING / "grafana" / "provisioning" / "datasources"
    (source,) = yaml.safe_load((folder / "prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    (variable,) = (v for v in DASHBOARD["templating"]["list"] if v["type"] == "datasource")
    assert variable["query"] == source["type"]
    assert variable["current"]["value"] == source["uid"]
    asked = [panel["datasource"] for panel in SHOWN]
    asked += [target["datasource"] for _, target in targets()]
    asked += [annotation["datasource"] for annotation in DASHBOARD["annotations"]["list"]]
    asked += [v["datasource"] for v in DASHBOARD["templating"]["list"] if v["type"] == "query"]
    assert {(one["type"], one["uid"]) for one in asked} == {(source["type"], f"${{{variable['name']}}}")}


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "config", "prometheus.yml"],
        ["check", "rules", "alerts.yml"],
        pytest.param(["test", "rules", "alerts.test.yml"], marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def test_with_prometheus_own_tool(arguments: list[str]) -> None:
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("promtool is not installed: apt-get install prometheus")
    run = subprocess.run([program, *arguments], cwd=MONITORING, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alarm_is_tried() -> None:
    tried = yaml.safe_load((MONITORING / "alerts.test.yml").read_text(encoding="utf-8"))["tests"]
    sounds = {case["alertname"] for one in tried for case in one["alert_rule_test"] if case["exp_alerts"]}
    silent = {case["alertname"] for one in tried for case in one["alert_rule_test"] if not case["exp_alerts"]}
    alarms = {rule["alert"] for rule in RULES if "alert" in rule}
    assert sounds == alarms
    assert {"AsagExitLevelsChanged", "AsagPatchesChanged", "AsagDown", "AsagNotReady", "AsagFails"} <= silent


def test_the_page_has_every_panel_and_alarm() -> None:
    page = (ROOT / "docs" / "monitor.md").read_text(encoding="utf-8")
    panels, alarms = page.partition("## The dashboard")[2].split("## In a Grafana")[0].split("## Alarms")
    named = {
        title.strip() for row in re.findall(r"^\| ([^|]+) \|", panels, re.MULTILINE) for title in parts(row)
    }
    assert {panel["title"] for panel in SHOWN} == named - {"panel"}
    assert {rule["alert"] for rule in RULES if "alert" in rule} == set(re.findall(r"`(Asag\w+)`", alarms))


def parts(row: str) -> list[str]:
    """The titles in the first cell of a row: several stand for themselves where a panel is not called so."""
    titles = {panel["title"] for panel in SHOWN}
    return [row] if row in titles else re.split(r"; |, (?=[A-Z])", row)


@pytest.mark.parametrize("name", ["monitored_run", "playground_browser"])
def test_what_draws_a_pages_picture_says_what_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tests" / "support" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 0
    assert "the PNG to write" in capsys.readouterr().out


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    read = monitored_run.run(bundle.path, images=20)
    assert len(read) == 1 + 3 * 20 // monitored_run.STEP
    ends = monitored_run.windows(read)
    assert [at for at, _ in ends] == list(range(monitored_run.WINDOW, 61, monitored_run.STEP))
    for _, rise in ends:
        assert sum(monitored_run.shares(rise).values()) == pytest.approx(1)
        assert rise["asag_patches_count"] == monitored_run.WINDOW
    assert len(list(monitored_run.table(read, images=20))) == 3
    monitored_run.picture(read, tmp_path / "drawn.png", images=20)
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
