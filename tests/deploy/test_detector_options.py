"""The detector's options on the command line, for every program that loads a detector."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from asag_deploy.backends import BACKENDS
from asag_deploy.command_line import OneSentenceParser
from asag_deploy.detector_options import DetectorOptions, add_detector_options, backends_of, detector_options
from asag_deploy.errors import ConfigError
from support.tiny_bundle import ANCHOR_CAP, MAX_DETECTIONS, make_bundle


def parse(*arguments: str, several: bool = False) -> Any:
    parser = OneSentenceParser(prog="some-program")
    add_detector_options(parser, several_backends=several)
    return parser.parse_args(arguments)


def test_what_is_asked_for_reaches_the_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(
        "asag_deploy.detector.Detector.load", lambda *one, **named: given.append((one, named))
    )
    arguments = ["--backend", "openvino", "--mode", "fast", "--max-level", "P4", "--deadline-ms", "12.5"]
    arguments += [
        "--threads",
        "3",
        "--requests",
        "2",
        "--loop",
        "host",
        "--max-detections",
        "7",
        "--anchor-cap",
        "30",
    ]
    detector_options(parse(*arguments)).load("some/bundle")
    asked = {
        "backend": "openvino",
        "mode": "fast",
        "max_level": "P4",
        "deadline_ms": 12.5,
        "threads": 3,
        "requests": 2,
        "loop": "host",
        "max_detections": 7,
        "anchor_cap": 30,
    }
    assert given == [(("some/bundle",), asked)]


def test_nothing_asked_for_is_the_detectors_own_choice() -> None:
    assert detector_options(parse()) == DetectorOptions()
    assert detector_options(parse(several=True)) == DetectorOptions()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--requests", "0"], "--requests is 0; it must be"),
        (["--threads", "-1"], "--threads is -1; it must be"),
        (["--deadline-ms", "0"], "--deadline-ms is 0; it must be more than 0, 2592000000 at most"),
        (["--deadline-ms", "nan"], "--deadline-ms is nan"),
        (["--mode", "slow"], "invalid choice: 'slow'"),
        (["--max-level", "P7"], "invalid choice: 'P7'"),
        (["--max-detections", "0"], "--max-detections is 0"),
        (["--anchor-cap", "many"], "--anchor-cap"),
        (["--loop", "gpu"], "invalid choice: 'gpu'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: list[str], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        detector_options(parse(*arguments))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--anchor-cap", "1000"], f"--anchor-cap is 1000, and the bundle was exported for {ANCHOR_CAP}"),
        (["--anchor-cap", "1"], "--anchor-cap is 1; the bundle's network passes at least"),
        (["--max-detections", "99"], f"--max-detections is 99, and the bundle .* for {MAX_DETECTIONS} at"),
        (["--max-level", "P3"], "--max-level 'P3' is beyond the bundle, which was exported up to P4"),
    ],
)
def test_what_a_bundle_cannot_do_is_said_in_words_of_the_command_line(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    bundle = make_bundle(tmp_path / "bundle", levels=("P4",))
    chosen = detector_options(parse(*arguments))
    for refused in (lambda: chosen.load(bundle), lambda: chosen.stop_rule(bundle.manifest)):
        with pytest.raises(ConfigError, match=f"^{sentence}"):
            refused()


def test_what_names_no_option_stays_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^unknown backend 'torch'"):
        detector_options(parse("--backend", "torch")).load("some/bundle")


def test_several_backends() -> None:
    parsed = parse(
        "--backend", "openvino,onnxruntime", "--backend", "openvino", "--threads", "2", several=True
    )
    assert backends_of(parsed) == ("openvino", "onnxruntime")
    assert detector_options(parsed, backend="onnxruntime") == DetectorOptions(
        backend="onnxruntime", threads=2
    )
    assert backends_of(parse(several=True)) == ("onnxruntime",)


def test_an_unknown_one_of_several_backends_is_refused() -> None:
    with pytest.raises(
        ConfigError, match="unknown backend 'torch'; the backends are onnxruntime, "
    ) as caught:
        backends_of(parse("--backend", "onnxruntime,torch", several=True))
    assert all(name in str(caught.value) for name in BACKENDS)


def test_a_program_with_requests_of_its_own() -> None:
    parser = OneSentenceParser(prog="some-program")
    add_detector_options(parser, own_requests=True)
    assert detector_options(parser.parse_args([])) == DetectorOptions()
    with pytest.raises(ConfigError, match="unrecognized arguments: --requests 2"):
        parser.parse_args(["--requests", "2"])
