"""English prose for distillation: text out of Debian packages, fetched by name, never installed.

    python examples/smollm2-135m/corpus.py --output DIR [--megabytes-per-source 8]

DIR/train.jsonl and DIR/valid.jsonl (every fortieth document by a hash of its name), a line for each
document, and DIR/sources.txt. Needs apt-get with package lists, dpkg-deb and about 200 MB. The same
bytes on every run with the same package versions. Licences: public domain (Austen, the Bible, the
Jargon file, the Devil's dictionary), GPL, GFDL, CC-BY-SA, PSF and Artistic (the others).
"""

import gzip
import html.parser
import json
import re
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.cli.parser import REQUIRED, flag, parse
from megatron_ext.runtime.errors import RUNTIME, UserError, run_main

Documents = Iterator[tuple[str, str]]
LEAST, MOST = 300, 200_000  # characters of a document
HANDBOOK = "doc/debian-handbook/html/en-US"
VALIDATION = 40  # one document in so many


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Corpus."""

    output: str = flag(REQUIRED, "folder to write to")
    megabytes_per_source: float = flag(8.0, "text taken of each source at most")


@dataclass(frozen=True, kw_only=True)
class CorpusFlags:
    """Write an English corpus."""

    corpus: Corpus


class PageText(html.parser.HTMLParser):
    """The text of an HTML page without navigation, an empty line between blocks."""

    BLOCKS = frozenset(
        "p|div|li|dt|dd|h1|h2|h3|h4|h5|tr|table|ul|ol|pre|br|section|blockquote|title".split("|")  # noqa: SIM905
    )
    SKIPPED = frozenset(("script", "style", "nav", "head", "footer"))

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.depth_skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """Begin a block, or something that is skipped."""
        if tag in self.SKIPPED:
            self.depth_skipped += 1
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        """End it."""
        if tag in self.SKIPPED:
            self.depth_skipped = max(0, self.depth_skipped - 1)
        elif tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        """Keep text outside of what is skipped."""
        if not self.depth_skipped:
            self.parts.append(data.replace("\r", ""))


def page(text: str) -> str:
    """Return the paragraphs of an HTML page."""
    parser = PageText()
    parser.feed(text)
    parser.close()
    return unwrap("".join(parser.parts), between="\n\n")


def unwrap(text: str, between: str = r"\n\s*\n") -> str:
    """Return the paragraphs of ``text``, each on one line."""
    paragraphs = (" ".join(part.split()) for part in re.split(between, text))
    return "\n\n".join(part for part in paragraphs if len(part) > 1)


def pod(text: str) -> str:
    """Return Perl's documentation without its markup."""
    commands = r"^=(head\d|item|over|back|cut|encoding|pod|for|begin|end)[ \t]*"
    return re.sub(r"[BCFILSXEZ]<+ ?([^<>]*?) ?>+", r"\1", re.sub(commands, "", text, flags=re.M))


def rst(text: str) -> str:
    """Return reStructuredText without directives and roles."""
    text = re.sub(r"^\.\. .*$", "", text, flags=re.M)
    return re.sub(r":[a-z:]+:`[~!]?([^`<]*?)(?: <[^>]*>)?`", r"\1", text).replace("``", "`")


def read(path: Path) -> str:
    """Return the text of a file, unpacked."""
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix in (".gz", ".dz") else data).decode(
        "utf-8", "replace"
    )


def files(folder: str, pattern: str, convert: Callable[[str], str]) -> Callable[[Path], Documents]:
    """Return a reader: each file below usr/share/``folder`` is a document."""

    def documents(root: Path) -> Documents:
        share = root / "usr/share"
        for path in sorted((share / folder).glob(pattern)):
            yield str(path.relative_to(share)), convert(read(path))

    return documents


def entries(name: str) -> Callable[[Path], Documents]:
    """Return a reader of a dictionary: forty entries are a document."""

    def documents(root: Path) -> Documents:
        heads = re.split(r"\n(?=\S)", read(root / f"usr/share/dictd/{name}.dict.dz"))
        yield from in_forties("", [" ".join(head.split()) for head in heads])

    return documents


def in_forties(name: str, texts: Sequence[str]) -> Documents:
    """Yield forty short texts as one document."""
    for start in range(0, len(texts), 40):
        yield f"{name}{start}", "\n\n".join(texts[start : start + 40])


def fortunes(root: Path) -> Documents:
    """Yield the quotations of the program fortune."""
    for path in sorted((root / "usr/share/games/fortunes").iterdir()):
        if path.is_file() and not path.suffix:
            yield from in_forties(f"{path.name}-", read(path).split("\n%\n"))


def bible(root: Path) -> Documents:
    """Yield the chapters of the King James Bible, which the package's program prints."""
    program = next(
        path for path in (root / "usr/games/bible", root / "usr/bin/bible") if path.exists()
    )
    whole = [program, "-p", root / "usr/lib", "-f", "gen1:1-rev22:21"]
    environment = {"PATH": "/usr/bin", "PAGER": "cat"}
    lines = subprocess.run(whole, capture_output=True, text=True, env=environment, check=True)
    chapters: dict[str, list[str]] = {}
    for line in lines.stdout.splitlines():
        if match := re.match(r"([0-9A-Za-z]+?) ?(\d+):(\d+)\s+(.*)", line):
            chapters.setdefault(f"{match[1]}{match[2]}", []).append(match[4])
    for name, verses in chapters.items():
        yield name, " ".join(verses)


def austen(root: Path) -> Documents:
    """Yield the chapters of Jane Austen's novels, which lie in an R database.

    Its objects follow one another: four bytes of size, then zlib. A string is marked as ASCII
    (00 04 00 09) with its length.
    """
    blob = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    at = 0
    while at < len(blob):
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(blob[at + 4 :])
        at = len(blob) - len(unpacker.unused_data)
        lines, end = [], 0
        for match in re.finditer(rb"\x00\x04\x00\x09(....)", raw, re.S):
            length = int.from_bytes(match[1], "big")
            if match.start() >= end and length < 200:
                end = match.end() + length
                lines.append(raw[match.end() : end].decode())
        novel = "\n".join(lines)
        if len(novel) > 50_000:
            for number, chapter in enumerate(re.split(r"\n(?=chapter|CHAPTER|Chapter)", novel)):
                yield f"{at}-{number}", unwrap(chapter)


# name: packages, and what reads their documents.
SOURCES: dict[str, tuple[tuple[str, ...], Callable[[Path], Documents]]] = {
    "austen": (("r-cran-janeaustenr",), austen),
    "bible": (("bible-kjv", "bible-kjv-text"), bible),
    "anarchism": (("anarchism",), files("doc/anarchism/html", "*.html", page)),
    "gcide": (("dict-gcide",), entries("gcide")),
    "foldoc": (("dict-foldoc",), entries("foldoc")),
    "jargon": (("dict-jargon",), entries("jargon")),
    "devil": (("dict-devil",), entries("devil")),
    "fortunes": (("fortunes",), fortunes),
    "debian-handbook": (
        ("debian-handbook",),
        files(HANDBOOK, "*.html", page),
    ),
    "debian-history": (("debian-history",), files("doc/debian-history/docs", "*.en.html", page)),
    "gnome": (("gnome-user-docs",), files("help/C/gnome-help", "*.page", page)),
    "python": (("python3.11-doc",), files("doc/python3.11/html/_sources", "**/*.txt", rst)),
    "perl": (("perl-doc",), files("perl/5.36.0/pod", "*.pod", pod)),
    "git": (("git-doc",), files("doc/git-doc", "*.txt", str)),
    "linux": (("linux-doc-6.1",), files("doc/linux-doc-6.1", "**/*.rst.gz", rst)),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Fetch, unpack, read and write."""
    options = parse(CorpusFlags, argv).corpus
    output = Path(options.output)
    root = output / "packages"
    root.mkdir(parents=True, exist_ok=True)
    report = []
    with (output / "train.jsonl").open("w") as train, (output / "valid.jsonl").open("w") as valid:
        for name, (packages, documents) in SOURCES.items():
            unpack(packages, root)
            chosen = sample(name, documents(root), options.megabytes_per_source * 1e6)
            for is_validation, line in chosen:
                (valid if is_validation else train).write(line)
            held = sum(is_validation for is_validation, _ in chosen)
            size = sum(len(line) for _, line in chosen) / 1e6
            report.append(
                f"{name:16}{len(chosen):6} documents, {held:4} validation, {size:6.2f} MB"
            )
            print(report[-1], flush=True)
    (output / "sources.txt").write_text("\n".join(report) + "\n")


def unpack(packages: Sequence[str], root: Path) -> None:
    """Download Debian packages and unpack them below ``root``."""
    for package in packages:
        if not (found := list(root.glob(f"{package}_*.deb"))):
            subprocess.run(
                ["apt-get", "download", "--quiet", package],
                cwd=root,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                check=False,
            )
            found = list(root.glob(f"{package}_*.deb"))
        if not found:
            raise UserError(
                f"apt-get could not download {package} (apt-get update?); give --data instead.",
                RUNTIME,
            )
        subprocess.run(["dpkg-deb", "-x", found[0], root], check=True)


def sample(name: str, documents: Documents, most: float) -> list[tuple[bool, str]]:
    """Return (whether for validation, line of JSON) of documents up to ``most`` characters.

    In the order of a hash of their names: a sample of a long source, not its beginning.
    """
    hashed = sorted(
        (zlib.crc32(f"{name}/{key}".encode()), key, text[:MOST])
        for key, text in documents
        if len(text) > LEAST
    )
    chosen, size = [], 0
    for code, key, text in hashed:
        if size > most:
            break
        line = json.dumps({"id": f"{name}/{key}", "text": text}) + "\n"
        chosen.append((code % VALIDATION == 0, line))
        size += len(text)
    return chosen


if __name__ == "__main__":
    if sys.platform != "linux":
        raise SystemExit("ERROR: this corpus comes out of Debian packages.")
    run_main(main)
