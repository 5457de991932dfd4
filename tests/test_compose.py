"""The Compose file: by its schema, and against what it mounts, starts and asks.  Starting it needs Docker."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("check_jsonschema", reason="check-jsonschema brings the schema of Compose files")
pytest.importorskip("yaml", reason="PyYAML is not installed")

import jsonschema
import yaml

from asag_deploy import Detector
from asag_deploy.serving import cli
from support.served import serving
from support.tiny_bundle import make_bundle

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")
GIVEN = {"ASAG_BUNDLE": "/models/bundle", "GRAFANA_PASSWORD": "of nobody"}
"""What has to be given."""

each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def filled(value: Any, given: dict[str, str]) -> Any:
    """A value as Compose fills its variables in; raises KeyError where one has to be given."""
    if isinstance(value, dict):
        return {key: filled(one, given) for key, one in value.items()}
    if isinstance(value, list):
        return [filled(one, given) for one in value]
    if not isinstance(value, str):
        return value

    def put(found: re.Match[str]) -> str:
        name, sign, words = found.groups()
        if sign == "-":
            return given.get(name, words)
        return given[name]

    return VARIABLE.sub(put, value)


FILLED: dict[str, dict[str, Any]] = filled(SERVICES, GIVEN)


def schema() -> Any:
    """Return the one of Compose files that check-jsonschema brings."""
    vendored = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    return json.loads(vendored.read_text(encoding="utf-8"))


def mounts(name: str) -> list[tuple[str, str, bool]]:
    """Of each volume of a service: what is mounted, where, and whether only to read."""
    found = []
    for volume in FILLED[name]["volumes"]:
        if isinstance(volume, dict):
            found.append((volume["source"], volume["target"], volume["read_only"]))
        else:
            source, target, *mode = volume.split(":")
            found.append((source, target, mode == ["ro"]))
    return found


def test_it_is_what_compose_reads() -> None:
    jsonschema.validate(filled(COMPOSE, GIVEN), schema())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ports": 8000}, "ports"),
        ({"read_onyl": True}, "read_onyl"),
        ({"healthcheck": {"tests": []}}, "healthcheck"),
    ],
)
def test_what_compose_does_not_read_is_noticed(change: dict[str, Any], named: str) -> None:
    service = {**FILLED["asag"], **change}
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.validate({"services": {"asag": service}}, schema())
    assert named in str(caught.value)


def test_what_has_to_be_given_is_asked_for_in_words() -> None:
    text = (DOCKER / "compose.yaml").read_text(encoding="utf-8")
    asked = {name: words for name, sign, words in VARIABLE.findall(text) if sign != "-"}
    assert set(asked) == set(GIVEN)
    assert all(words.startswith(("the ", "a ")) for words in asked.values())
    for name in GIVEN:
        with pytest.raises(KeyError, match=name):
            filled(SERVICES, {key: value for key, value in GIVEN.items() if key != name})


@each_service
def test_no_service_may_more_than_it_needs(name: str) -> None:
    service = FILLED[name]
    user = service["user"].partition(":")[0]
    assert int(user) > 0
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert "privileged" not in service
    assert set(service["deploy"]["resources"]["limits"]) == {"cpus", "memory", "pids"}
    assert service["healthcheck"]["test"][0] == "CMD"
    for port in service["ports"]:
        assert re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port), port


@each_service
def test_images_are_pinned(name: str) -> None:
    service = FILLED[name]
    if "build" in service:
        file = DOCKER / service["build"]["context"] / service["build"]["dockerfile"]
        assert file.is_file()
        readme = (DOCKER / "README.md").read_text(encoding="utf-8")
        assert f"-f {service['build']['dockerfile']} -t {service['image']} ." in readme
    else:
        assert re.fullmatch(r"[\w./-]+:v?\d+\.\d+\.\d+", service["image"])


@each_service
def test_what_is_mounted_is_there(name: str) -> None:
    assert COMPOSE["volumes"] is not None
    for source, target, only_read in mounts(name):
        assert target.startswith("/")
        if source in COMPOSE["volumes"]:
            assert not only_read, source
        elif source != GIVEN["ASAG_BUNDLE"]:
            assert source.startswith("./monitoring/")
            assert (DOCKER / source).exists(), source
            assert only_read, source
        else:
            assert only_read


def test_every_named_volume_is_used() -> None:
    used = {source for name in SERVICES for source, _, _ in mounts(name)}
    assert set(COMPOSE["volumes"]) <= used


def test_what_prometheus_and_grafana_read_is_where_they_look() -> None:
    prometheus = {target: DOCKER / source for source, target, _ in mounts("prometheus")}
    (named,) = (a.partition("=")[2] for a in FILLED["prometheus"]["command"] if a.startswith("--config.file"))
    config = yaml.safe_load(prometheus[named].read_text(encoding="utf-8"))
    for rules in config["rule_files"]:
        assert prometheus[str(Path(named).parent / rules)].is_file()
    (job,) = config["scrape_configs"]
    (targets,) = (one["targets"] for one in job["static_configs"])
    port = FILLED["asag"]["ports"][0].rpartition(":")[2]
    assert targets == [f"asag:{port}"]
    grafana = {target: DOCKER / source for source, target, _ in mounts("grafana")}
    provisioning = grafana["/etc/grafana/provisioning"]
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "asag.yml").read_text())["providers"]
    dashboards = grafana[provider["options"]["path"]]
    home = FILLED["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert (dashboards / Path(home).name).is_file()
    assert Path(home).parent == Path(provider["options"]["path"])
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    assert source["url"] == f"http://prometheus:{FILLED['prometheus']['ports'][0].rpartition(':')[2]}"
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]


def test_the_server_knows_its_options_and_ends_in_time() -> None:
    service = FILLED["asag"]
    assert service["command"][0] == "serve"
    options = cli._parser().parse_args(service["command"][1:])
    (target,) = (target for source, target, _ in mounts("asag") if source == GIVEN["ASAG_BUNDLE"])
    assert str(options.bundle) == target
    assert str(options.port) == service["ports"][0].rpartition(":")[2]
    assert options.host == "0.0.0.0"
    assert options.warm_up
    assert str(options.threads) == service["deploy"]["resources"]["limits"]["cpus"]
    seconds = int(service["stop_grace_period"].removesuffix("s"))
    assert seconds > options.drain_seconds + options.grace_seconds
    user = re.search(r"^USER (\S+)$", (DOCKER / "serve.Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    assert user is not None
    assert user[1] == service["user"]
    cache = re.search(r"ASAG_CACHE_DIR=(\S+)", (DOCKER / "serve.Dockerfile").read_text(encoding="utf-8"))
    assert cache is not None
    assert ("asag-cache", cache[1], False) in mounts("asag")


def test_the_health_check_is_answered_by_a_server(tmp_path: Path) -> None:
    service = FILLED["asag"]
    kind, program, flag, code = service["healthcheck"]["test"]
    assert (kind, program, flag) == ("CMD", "python", "-c")
    with Detector.load(make_bundle(tmp_path / "bundle")) as detector, serving(detector) as server:
        asked = code.replace("127.0.0.1:8000", f"{server.host}:{server.port}")
        assert asked != code
        ready = subprocess.run([sys.executable, "-c", asked], capture_output=True)
        server.server.should_exit = True
        server.thread.join(20)
        ended = subprocess.run([sys.executable, "-c", asked], capture_output=True)
    assert ready.returncode == 0, ready.stderr
    assert ended.returncode != 0


def test_nothing_phones_home() -> None:
    environment = FILLED["grafana"]["environment"]
    for name in ("REPORTING_ENABLED", "CHECK_FOR_UPDATES", "CHECK_FOR_PLUGIN_UPDATES"):
        assert environment[f"GF_ANALYTICS_{name}"] == "false"
    assert environment["GF_PLUGINS_PREINSTALL_DISABLED"] == "true"
    assert SERVICES["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"].startswith("${GRAFANA_PASSWORD:?")


def test_prometheus_knows_its_options() -> None:
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("prometheus is not installed: apt-get install prometheus")
    said = subprocess.run([program, "--help"], capture_output=True, text=True)
    known = set(re.findall(r"(--[\w.-]+)", said.stdout + said.stderr))
    assert {argument.partition("=")[0] for argument in FILLED["prometheus"]["command"]} <= known
