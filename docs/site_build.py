"""Build the documentation site: `make docs`, or `python docs/site_build.py`; see build/site/index.html.

1. `zensical.toml` says which pages there are (`nav`).  Each is a Markdown file or a notebook below docs/, or
   a Markdown file elsewhere in the repository, such as plugins/README.md.
2. They are staged in build/pages.  Links are changed to lead to the staged page; pictures and data that pages
   show or link to are copied; a link to source code, of which there is no page, becomes its path in code
   font.  Notebooks are executed, and staged as Markdown with their outputs.
3. Zensical makes build/site of them, strictly: a link that leads nowhere is an error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import posixpath
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from asag_deploy.command_line import ALL_FINE, OneSentenceParser, exit_code
from asag_deploy.errors import ConfigError, first_line

if TYPE_CHECKING:
    from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "zensical.toml"
PAGES, SITE, THEME = "pages", "site", "theme"
"""Staged pages and the finished site, both below the build folder; style and scripts, below docs/."""
MARKER = ".made-by-site_build"
"""The file by which a folder is known for one of ours, whose pages and site may be replaced."""
_PACKAGES = (".", "training", "export", "benchmarks", "docs")
"""Where the API reference finds what it describes, and how docstrings are read."""
_COPIED = (".csv", ".jpg", ".json", ".png", ".svg")
"""What is copied from outside docs/; of docs/ everything is that a page links to."""
_SECONDS = 600
"""The most that a cell of a notebook may take."""

_CODE = (
    r"^ *(?P<fence>```+|~~~+).*?^ *(?P=fence) *$"
    r"|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\s*\n).)+?(?<!`)(?P=ticks)(?!`)"
)
_LABEL = r"(?P<label>(?:[^\[\]]|\[[^\[\]]*\])*)"
_LINK = re.compile(
    rf"{_CODE}|(?P<sign>!?)\[{_LABEL}\]\((?P<target>[^()\s]+)(?P<title>\s+\"[^\"]*\")?\)"
    r"|(?P<side>\](?= ?\[))",
    re.MULTILINE | re.DOTALL,
)
"""A link of Markdown; or a piece of code, in which nothing is a link; or the middle of `[a] [b]`."""


@dataclass
class Tree:
    """The repository, seen as pages; raises ConfigError where `nav` and the files below docs/ differ.

    All paths in it have slashes and are relative to the repository, and those of `staged` to build/pages.
    """

    root: Path
    staged: dict[str, str]
    """By the file of each page, where it is staged."""
    copied: dict[str, str] = field(default_factory=dict)
    """By file, where pictures and data that pages link to are to be copied; `markdown` adds to it."""

    @classmethod
    def of(cls, root: Path, config: Mapping[str, Any]) -> Tree:
        """Find the file of every page in `nav`, and see that every page below docs/ is there."""
        names = list(_names(config["project"]["nav"]))
        files = {_file_of(root, name): name for name in names}
        there = {
            path.relative_to(root).as_posix()
            for path in (root / "docs").rglob("*")
            if path.suffix in (".md", ".ipynb") and ".ipynb_checkpoints" not in path.parts
        }
        unlisted = sorted(there - set(files))
        if unlisted:
            raise ConfigError(
                f"no reader would find {', '.join(unlisted)}: add it to `nav` in {CONFIG}, or remove it"
            )
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(f"`nav` in {CONFIG} has {', '.join(twice)} more than once")
        return cls(root=root, staged=files)

    def markdown(self, text: str, file: str) -> str:
        """Return the Markdown of a file with links as they are in the site.

        Raises ConfigError for a link that leads nowhere, or to a page that is not in `nav`.
        """

        def changed(found: re.Match[str]) -> str:
            if found["side"]:  # for Zensical a link by reference, of which there are none here
                return r"\]"
            if found["target"] is None:
                return found[0]
            label, target = self.markdown(found["label"], file), found["target"]
            title = found["title"] or ""
            if re.match(r"[a-z]+:|//|#", target):
                return f"{found['sign']}[{label}]({target}{title})"
            path, mark, anchor = target.partition("#")
            there = posixpath.normpath(posixpath.join(posixpath.dirname(file), path))
            place = self._place(there, file, target)
            if place is None:
                return label if there in label.replace("`", "") else f"{label} (`{there}`)"
            here = posixpath.dirname(self.staged[file])
            return f"{found['sign']}[{label}]({posixpath.relpath(place, here or '.')}{mark}{anchor}{title})"

        return _LINK.sub(changed, text)

    def _place(self, there: str, file: str, target: str) -> str | None:
        """Return where a linked file is staged or copied to; None for source code and folders."""
        if there == "README.md":  # the repository's face; the site has its own
            there = "docs/index.md"
        page = next((p for p in (there, f"{there}/README.md") if p in self.staged), None)
        if page is not None:
            return self.staged[page]
        if there.startswith("..") or not (self.root / there).exists():
            raise ConfigError(f"{file} has a link to '{target}', and there is no such file")
        if there.endswith((".md", ".ipynb")):
            raise ConfigError(
                f"{file} has a link to '{target}', which is no page: add it to `nav` in {CONFIG}, or write "
                "its name without a link"
            )
        if not (self.root / there).is_file():
            return None
        if not there.startswith("docs/") and not there.endswith(_COPIED):
            return None
        return self.copied.setdefault(there, there.removeprefix("docs/"))


def _names(nav: Sequence[Any]) -> Iterator[str]:
    """Give the name of every page of a `nav`, however deep."""
    for item in nav:
        if isinstance(item, str):
            yield item
        else:
            for below in item.values():
                yield from _names([below] if isinstance(below, str) else below)


def _file_of(root: Path, name: str) -> str:
    """Return the file that a page of `nav` is made of."""
    notebook = f"docs/{name.removesuffix('.md')}.ipynb"
    for file in (f"docs/{name}", notebook, name):
        if (root / file).is_file():
            return file
    raise ConfigError(
        f"`nav` in {CONFIG} has {name}, but there is neither docs/{name} nor {notebook} nor {name}"
    )


class _NoHandlers(asyncio.SelectorEventLoop):
    """An event loop that leaves signals to the program: nbclient would end the kernel alone, and fail."""

    def add_signal_handler(self, *args: Any, **named: Any) -> None:  # type: ignore[override]
        """Refuse, as a loop in another thread does."""
        raise RuntimeError("signals belong to the program")

    def remove_signal_handler(self, sig: int) -> bool:
        """Return that there was none."""
        return False


def execute(notebook: NotebookNode, file: Path) -> None:
    """Run the cells of a notebook in its folder, in a new process that finds this repository's packages.

    Raises ConfigError if a cell fails, after what it said.
    """
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
    from traitlets.config import Config

    with tempfile.TemporaryDirectory() as own:  # for what a kernel leaves, however it ends
        # By files of its own: no port that others could reach.
        reached = Config({"KernelManager": {"transport": "ipc", "ip": str(Path(own, "kernel"))}})
        where = {"metadata": {"path": str(file.parent)}}
        client = NotebookClient(
            notebook, kernel_name="python3", timeout=_SECONDS, resources=where, config=reached
        )
        with Path(own, "stderr").open("w+", errors="replace") as said:
            try:
                with asyncio.Runner(loop_factory=_NoHandlers) as runner:
                    try:
                        environment = _environment() | {"IPYTHONDIR": own, "TMPDIR": own}
                        runner.run(client.async_execute(env=environment, stderr=said))
                    except KeyboardInterrupt:
                        # Asked politely the kernel tells of its own end, and nbclient calls that a failure.
                        client.shutdown_kernel = "immediate"
                        runner.get_loop().set_exception_handler(lambda *_: None)
                        raise
            except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
                said.seek(0)
                print(f"{said.read()}{error}", file=sys.stderr)
                raise ConfigError(
                    f"the notebook {file.name} fails; what its cell said stands above"
                ) from None


def notebook_page(notebook: NotebookNode, pictures: Path) -> str:
    """Return a notebook as Markdown, and write the pictures that its cells have shown.

    pictures: the folder for them, to lie beside the page; made if there is one.
    """
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import CoalesceStreamsPreprocessor

    notebook.metadata.setdefault("language_info", {"name": "python"})  # a kernel says so by itself
    exporter = MarkdownExporter()
    # What a cell prints comes in pieces, at random.
    exporter.register_preprocessor(CoalesceStreamsPreprocessor, enabled=True)
    text, resources = exporter.from_notebook_node(
        notebook, resources={"unique_key": "output", "output_files_dir": pictures.name}
    )
    for name, content in resources["outputs"].items():
        pictures.mkdir(parents=True, exist_ok=True)
        (pictures / Path(name).name).write_bytes(content)
    return str(text)


def stage(tree: Tree, pages: Path, *, notebooks: bool) -> None:
    """Write every page, and what pages link to, into an empty folder."""
    for file, name in tree.staged.items():
        source, target = tree.root / file, pages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.suffix == ".ipynb":
            notebook = _notebook(source, file)
            for cell in notebook.cells:
                if cell.cell_type == "markdown":
                    cell.source = tree.markdown(cell.source, file)
            if notebooks:
                execute(notebook, source)
            text = notebook_page(notebook, target.with_name(f"{target.stem}-output"))
        else:
            text = tree.markdown(_text(source, file), file)
        target.write_text(text, encoding="utf-8")
    copies = {tree.root / file: pages / name for file, name in tree.copied.items()}
    copies |= {path: pages / THEME / path.name for path in (tree.root / "docs" / THEME).iterdir()}
    for source, target in copies.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)


def _text(source: Path, file: str) -> str:
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is no UTF-8 text: {error.reason} at byte {error.start}") from error


def _notebook(source: Path, file: str) -> NotebookNode:
    import nbformat

    text = _text(source, file)
    try:
        return nbformat.reads(text, as_version=4)
    except Exception as error:  # whatever it stumbles over: it looks before it validates
        raise ConfigError(f"{file} is no notebook: {first_line(error)}") from error


def _config(root: Path) -> dict[str, Any]:
    """Read zensical.toml; raises ConfigError if it is none, or has no `nav`."""
    try:
        config = tomllib.loads(_text(root / CONFIG, CONFIG))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{CONFIG} is no TOML: {first_line(error)}") from error
    project = config.get("project")
    if not isinstance(project, dict) or not isinstance(project.get("nav"), list):
        raise ConfigError(f"{CONFIG} has no list `nav` in [project], which says what pages there are")
    return config


def _make_way(folder: Path, root: Path) -> None:
    """Remove what an earlier build has left in a folder; raises ConfigError if that is of no build."""
    docs = root.resolve() / "docs"
    if folder == root.resolve() or folder.is_relative_to(docs):
        raise ConfigError(f"'{folder}' holds what the site is made of: give another --output-dir")
    made = [folder / name for name in (PAGES, SITE, CONFIG)]
    if not (folder / MARKER).exists():
        there = next((path for path in made if path.exists()), None)
        if there is not None:
            raise ConfigError(f"'{there}' is of no earlier build: remove it, or give another --output-dir")
        folder.mkdir(parents=True, exist_ok=True)
        # First of all, so that a build that fails or is ended can be repeated.
        (folder / MARKER).write_text(f"{', '.join(path.name for path in made)} are replaced by every build\n")
    for old in (folder / PAGES, folder / SITE):
        shutil.rmtree(old, ignore_errors=True)


def build(folder: Path, *, root: Path = ROOT, notebooks: bool = True) -> Path:
    """Build the site of a repository below a folder, and return where its first page is.

    notebooks: whether they are executed; else their pages show their code alone.  What an earlier build has
    left in the folder is replaced.  Raises ConfigError for what keeps the site from being whole; what
    Zensical says about it goes to stderr.
    """
    import_module("zensical")  # it runs on its own below: what is missing is said before that
    tree = Tree.of(root, _config(root))
    folder = folder.resolve()
    _make_way(folder, root)
    stage(tree, folder / PAGES, notebooks=notebooks)
    shutil.copyfile(root / CONFIG, folder / CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--clean", "--strict", "--config-file", folder / CONFIG],
        cwd=folder,
        env=_environment() | {"NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    first = folder / SITE / "index.html"
    if done.returncode != 0 or not first.is_file():
        # After what is wrong with the pages it only shows where in itself it gave up.
        said, gave_up, why = done.stdout.partition("Traceback (most recent call last):")
        print(said if "Aborted because --strict" in why else said + gave_up + why, file=sys.stderr)
        raise ConfigError("the site cannot be built; what Zensical says stands above")
    return first


def _environment() -> dict[str, str]:
    """Return this process's environment, in which Python finds the packages of this repository first."""
    paths = [*(str(ROOT / name) for name in _PACKAGES), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def main(argv: Sequence[str] | None = None) -> int:
    """Build the site; returns 0, or 2 with the reason in one sentence on stderr."""

    def command() -> int:
        options = _parser().parse_args(argv)
        print(build(options.output_dir, notebooks=options.notebooks))
        return ALL_FINE

    return exit_code("docs", command)


def _parser() -> argparse.ArgumentParser:
    parser = OneSentenceParser(prog="docs", description="Build the documentation site.")
    add = parser.add_argument
    add("--output-dir", type=Path, default=ROOT / "build", metavar="DIR", help="default: build/")
    add(
        *("--no-notebooks",),
        dest="notebooks",
        action="store_false",
        help="do not execute the notebooks, which takes minutes: their pages show no outputs",
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
