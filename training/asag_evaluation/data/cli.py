"""`asag-data`: generate, convert and check data sets from the command line."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from asag_deploy.command_line import (
    ALL_FINE,
    MOST_PIXELS,
    SOME_FAILED,
    OneSentenceParser,
    exit_code,
    printable,
    progress,
    whole_number,
)
from asag_deploy.errors import DataError, plural
from asag_evaluation.data.coco import TRAIN_SPLIT, CocoDataset
from asag_evaluation.data.crowdhuman import convert_crowdhuman
from asag_evaluation.data.orientation import add_orientation_option
from asag_evaluation.data.scenes import KINDS, USUAL_KINDS, write_scenes
from asag_evaluation.data.stored_boxes import about_boxes_as_stored
from asag_evaluation.data.voc import convert_voc
from asag_evaluation.data.voc_layout import TRAIN_PART
from asag_evaluation.data.written import Converted
from asag_evaluation.data.yolo import PARTS, convert_yolo
from asag_evaluation.data.yolo_writing import part_of, write_yolo

PROGRAM = "asag-data"

_MOST_REPORTED = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Run `asag-data` with these arguments (None: the command line's) and return its exit code.

    0: all fine; 1: a checked data set has images that cannot be read, or boxes to be doubted; 2: nothing
    could be done, with the reason in one sentence on stderr; 130: interrupted.
    """

    def command() -> int:
        options = _parser().parse_args(argv)
        try:
            return int(options.run(options))
        except KeyboardInterrupt:
            print(f"{PROGRAM}: interrupted", file=sys.stderr)
            raise

    return exit_code(PROGRAM, command)


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(
        prog=PROGRAM, description="Generate, convert and check data sets in COCO layout."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    scenes = commands.add_parser("scenes", help="generate scenes of drawn objects")
    add = scenes.add_argument
    add("--output-dir", type=Path, required=True, metavar="DIR", help="the data set's folder")
    add("--count", type=whole_number(1), default=1000, metavar="N", help="how many (default: 1000)")
    add(
        "--seed", type=whole_number(0), default=0, metavar="S", help="another seed, other scenes (default: 0)"
    )
    add(
        "--size",
        type=whole_number(1, MOST_PIXELS),
        default=320,
        metavar="PIXELS",
        help="width and height (default: 320)",
    )
    _add_split(add)
    add(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(USUAL_KINDS),
        metavar="KIND",
        help=f"of {', '.join(KINDS)}, in equal parts; a crowd has 60 to 200 objects "
        f"(default: {' '.join(USUAL_KINDS)})",
    )
    scenes.set_defaults(run=_scenes)

    crowdhuman = commands.add_parser("crowdhuman", help="convert CrowdHuman's .odgt to COCO layout")
    add = crowdhuman.add_argument
    add("odgt", type=Path, metavar="ODGT", help="annotation_train.odgt or annotation_val.odgt")
    add("--images", type=Path, required=True, metavar="DIR", help="the folder of the images")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="the data set's folder")
    _add_split(add)
    crowdhuman.set_defaults(run=_crowdhuman)

    yolo = commands.add_parser("yolo", help="convert a data set in YOLO layout to COCO layout")
    add = yolo.add_argument
    add("data", type=Path, metavar="DATA", help="the data set's folder, or its data.yaml")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="the folder of the data set to write")
    add("--part", choices=PARTS, default=PARTS[0], help="which images of data.yaml (default: train)")
    add(
        "--split",
        type=_file_name,
        metavar="NAME",
        help="what to call it (default: train2017, val2017 or test2017)",
    )
    yolo.set_defaults(run=_yolo)

    voc = commands.add_parser("voc", help="convert a data set in Pascal VOC's layout to COCO layout")
    add = voc.add_argument
    add("data", type=Path, metavar="DATA", help="the folder that holds Annotations, or images and XML files")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="the folder of the data set to write")
    add(
        "--part",
        type=_list_name,
        metavar="NAME",
        help=f"a list of ImageSets/Main (default: {TRAIN_PART}; without lists, all images are taken)",
    )
    add("--split", type=_file_name, metavar="NAME", help="what to call it (default: PART2017)")
    add(
        "--classes",
        nargs="+",
        metavar="NAME",
        help="the classes, by id (default: all that the XML files name, in the alphabet's order)",
    )
    add(
        "--count-from-one",
        action="store_true",
        help="the first pixel is 1, as in PASCAL's own files, and not 0 as most tools have it",
    )
    voc.set_defaults(run=_voc)

    to_yolo = commands.add_parser("to-yolo", help="convert a data set in COCO layout to YOLO layout")
    add = to_yolo.add_argument
    add("data", type=Path, metavar="DIR", help="the data set's folder")
    add("--output-dir", type=Path, required=True, metavar="DIR", help="the folder of the data set to write")
    _add_split(add)
    add("--part", choices=PARTS, help="what data.yaml calls it (default: as the split is called)")
    add_orientation_option(to_yolo)
    to_yolo.set_defaults(run=_to_yolo)

    check = commands.add_parser("check", help="read every image and annotation of a data set")
    check.add_argument("data", type=Path, metavar="DIR", help="the data set's folder")
    check.add_argument(
        "--split", type=_file_name, default=TRAIN_SPLIT, metavar="NAME", help=f"default: {TRAIN_SPLIT}"
    )
    add_orientation_option(check)
    check.set_defaults(run=_check)
    return parser


def _add_split(add: Callable[..., object]) -> None:
    add(
        "--split",
        type=_file_name,
        default=TRAIN_SPLIT,
        metavar="NAME",
        help=f"which part it is (default: {TRAIN_SPLIT})",
    )


def _file_name(text: str) -> str:
    """Return the name of a split; raises ArgumentTypeError for one that no file in a folder can have."""
    if not text.strip() or text in (".", "..") or any(sign in text for sign in "/\\\0"):
        raise argparse.ArgumentTypeError(f"{text!r:.100} is no name of a part: give a word, such as val2017")
    return text


def _list_name(text: str) -> str:
    """Return the name of a list, without `.txt`."""
    return _file_name(text.removesuffix(".txt"))


def _scenes(options: argparse.Namespace) -> int:
    with progress(total=options.count, unit="scene") as bar:
        file = write_scenes(
            options.output_dir,
            count=options.count,
            seed=options.seed,
            size=options.size,
            split=options.split,
            kinds=tuple(options.kinds),
            progress=lambda done: bar.update(done - bar.n),
        )
    dataset = CocoDataset.from_files(file, options.output_dir / options.split)
    kinds = Counter(record.kind for record in dataset.records)
    print(f"{file}: {dataset.counts.describe()} ({', '.join(f'{n} {kind}' for kind, n in kinds.items())})")
    return ALL_FINE


def _crowdhuman(options: argparse.Namespace) -> int:
    with progress(unit="image") as bar:
        file = convert_crowdhuman(
            options.odgt,
            options.images,
            options.output_dir,
            split=options.split,
            progress=lambda done: bar.update(done - bar.n),
        )
    dataset = CocoDataset.from_files(file, options.output_dir / options.split)
    print(f"{file}: {dataset.counts.describe()}")
    return ALL_FINE


def _yolo(options: argparse.Namespace) -> int:
    split = options.split or f"{options.part}2017"
    with progress(unit="image") as bar:
        made = convert_yolo(
            options.data,
            options.output_dir,
            part=options.part,
            split=split,
            progress=lambda done: bar.update(done - bar.n),
        )
    dataset = CocoDataset.from_files(made.file, options.output_dir / split)
    return _said(made, dataset)


def _voc(options: argparse.Namespace) -> int:
    split = options.split or f"{options.part or TRAIN_PART}2017"
    with progress(unit="image") as bar:
        made = convert_voc(
            options.data,
            options.output_dir,
            split=split,
            part=options.part,
            classes=options.classes,
            count_from_one=options.count_from_one,
            progress=lambda done: bar.update(done - bar.n),
        )
    dataset = CocoDataset.from_files(made.file, options.output_dir / split)
    return _said(made, dataset)


def _to_yolo(options: argparse.Namespace) -> int:
    dataset = CocoDataset.open(options.data, options.split, orientation=options.orientation)
    with progress(total=len(dataset), unit="image") as bar:
        made = write_yolo(
            dataset,
            options.output_dir,
            split=options.split,
            part=options.part or part_of(options.split),
            progress=lambda done: bar.update(done - bar.n),
        )
    return _said(made, dataset)


def _said(made: Converted, dataset: CocoDataset) -> int:
    print(printable(f"{made.file}: {dataset.counts.describe()}"))
    for remark in made.remarks:
        print(printable(remark))
    return ALL_FINE


def _check(options: argparse.Namespace) -> int:
    dataset = CocoDataset.open(options.data, options.split, orientation=options.orientation)
    print(f"{options.data} {options.split}: {dataset.counts.describe()}")
    as_stored = about_boxes_as_stored(dataset)
    for remark in filter(None, (*dataset.remarks(None), as_stored)):
        print(printable(remark))
    labels = Counter(int(label) for record in dataset.records for label in record.labels)
    for label, category in enumerate(dataset.categories):
        print(printable(f"  {category.id:>4} {category.name}: {labels[label]}"))
    damaged = 0
    with progress(total=len(dataset), unit="image") as bar:
        for index in range(len(dataset)):
            try:
                dataset[index]
            except DataError as error:
                damaged += 1
                if damaged <= _MOST_REPORTED:
                    bar.write(f"{PROGRAM}: {printable(str(error))}", file=sys.stderr)
            bar.update()
    print(f"{plural(damaged, 'image')} cannot be read" if damaged else "all images can be read")
    return SOME_FAILED if damaged or dataset.doubts or as_stored else ALL_FINE


if __name__ == "__main__":
    sys.exit(main())
