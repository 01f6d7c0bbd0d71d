#!/usr/bin/env python3
"""Build a real text corpus (about 330 MB: prose, documentation, code, 11 languages) from Debian packages.

    build_corpus.py OUT_DIR [--only prose,docs,multilingual,code] [--cache DIR] [--kernel]

Writes OUT_DIR/train.jsonl and OUT_DIR/valid.jsonl, one {"id", "text", "source", "category"} a line, shuffled with a
fixed seed; about 1 % of the documents, chosen by a hash of their text, are validation. Needs apt-get and dpkg-deb;
nothing is installed. The texts keep their own licences (GPL, GFDL, CC-BY-SA, MPL, public domain): fetch them, do not
commit them. `xz -T2 -6` packs the whole to about 60 MB.
"""

import argparse
import gzip
import hashlib
import html
import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

from bytelatent.errors import UserError, guarded
from bytelatent.files import whole_file

CATEGORIES = ("prose", "docs", "multilingual", "code")


class _Text(HTMLParser):
    skip = frozenset({"script", "style", "nav", "head", "footer", "svg"})
    heading = frozenset({"h1", "h2", "h3", "h4", "h5"})
    block = heading | {"p", "div", "li", "tr", "br", "pre", "dt", "dd", "section", "table"}

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.out: list[str] = []
        self.depth = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.depth += tag in self.skip
        if tag in self.block:
            self.out.append("\n")

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag in self.skip and self.depth > 0
        if tag in self.block:
            self.out.append("\n")

    def handle_data(self, data: str) -> None:
        if not self.depth:
            self.out.append(data)


def from_html(text: str) -> str:
    parser = _Text()
    parser.feed(text)
    return re.sub(r"\n\s*\n+", "\n\n", "".join(parser.out)).strip()


def from_mallard(text: str) -> str:
    text = html.unescape(re.sub(r"<!--.*?-->", "", text, flags=re.S))
    return re.sub(r"[ \t]+", " ", re.sub(r"\n\s*\n+", "\n\n", re.sub(r"<[^>]+>", "", text))).strip()


def from_roff(text: str) -> str:
    text = re.sub(r"^\.\\\".*$|^'\\\".*$", "", text, flags=re.M)
    text = re.sub(r"\\f[BIRP]|\\f\(..|\\&|\\/|\\\|", "", text).replace("\\-", "-")
    known = {r"\(aq": "'", r"\(co": "©", r"\(bu": "•", r"\(em": "—", r"\(en": "–"}
    text = re.sub(r"\\\(\w\w|\\\[[^\]]*\]", lambda m: known.get(m.group(0), ""), text)
    macros = "SH|SS|TP|PP|P|B|I|BR|IR|BI|RB|RI|IP|TH|Sh|Nm|Nd|Pp|Fl|Ar|It|Op|Xr"
    text = re.sub(rf'^\.({macros})\b *"?(.*?)"?$', r"\2", text, flags=re.M)
    text = re.sub(r"^\.\S*.*$", "", text, flags=re.M)
    return re.sub(r"\n\s*\n+", "\n\n", text).strip()


def plain(text: str) -> str:
    return text


# name, category, packages, pattern of the files, how a file becomes text, longest document in bytes (0: the whole file)
LANGS = ["de", "fr", "ja", "zh", "ru", "pl", "uk"]
HELP = ["de", "fr", "ja", "ko", "zh-cn", "ru", "en-us"]
SOURCES = [
    ("gcide", "prose", ["dict-gcide"], r"\.dict\.dz$", plain, 16384),
    ("foldoc", "prose", ["dict-foldoc"], r"\.dict\.dz$", plain, 16384),
    ("anarchism", "prose", ["anarchism"], r"html/.*\.html$", from_html, 0),
    ("debian-handbook", "multilingual", ["debian-handbook"], r"\.html$", from_html, 0),
    ("gnome-user-docs", "multilingual", ["gnome-user-docs"], r"\.page(\.gz)?$", from_mallard, 0),
    ("install-guide", "multilingual", ["installation-guide-amd64"], r"\.html(\.gz)?$", from_html, 0),
    *[(f"man-{x}", "multilingual", [f"manpages-{x}"], r"man\d[a-z]*/.*\.gz$", from_roff, 0) for x in LANGS],
    *[(f"help-{x}", "multilingual", [f"libreoffice-help-{x}"], r"/text/.*\.html$", from_html, 0) for x in HELP],
    ("man-en", "docs", ["manpages", "manpages-dev"], r"man\d/.*\.gz$", from_roff, 0),
    ("linux-doc", "docs", ["linux-doc-6.1"], r"_sources/.*\.(txt|rst)(\.gz)?$", plain, 0),
    ("python-doc", "docs", ["python3.11-doc"], r"_sources/.*\.txt(\.gz)?$", plain, 0),
    ("perl-doc", "docs", ["perl-doc"], r"\.pod$", plain, 0),
    ("py-stdlib", "code", ["libpython3.11-stdlib", "libpython3.11-minimal"], r"\.py$", plain, 0),
    ("py-tests", "code", ["libpython3.11-testsuite"], r"\.py$", plain, 0),
    ("perl-modules", "code", ["perl-modules-5.36"], r"\.(pm|pl)$", plain, 0),
]
AUSTEN = "r-cran-janeaustenr"  # six novels, stored as R's lazy-load database


def austen(root: Path) -> Iterator[str]:
    """Yield the novels' lines: chunks of [4-byte big-endian length, zlib stream] holding R's CHARSXPs."""
    blob = next(root.rglob("Rdata.rdb")).read_bytes()
    at = 0
    while at < len(blob):
        inflate = zlib.decompressobj()
        raw = inflate.decompress(blob[at + 4 :])
        at = len(blob) - len(inflate.unused_data)
        lines, j = [], 0
        while m := re.compile(rb"\x00[\x00-\x0f][\x00-\xff]\x09([\x00-\xff]{4})", re.S).search(raw, j):
            size = struct.unpack(">I", m.group(1))[0]
            if size < 2000 and m.end() + size <= len(raw):
                lines.append(raw[m.end() : m.end() + size].decode("utf8", "replace"))
                j = m.end() + size
            else:
                j = m.start() + 1
        text = "\n".join(lines)
        yield from (text[i : i + 20000] for i in range(0, len(text), 20000))


def unpack(package: str, cache: Path) -> Path:
    """The folder with a package's files, downloaded unless `cache` has it.

    Raises:
        UserError: apt-get is missing, or cannot download the package.
    """
    root = cache / package
    if not root.exists():
        aside = cache / f".{package}.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        # As the user who calls, for apt's own may not write here.
        run(["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", package], package, aside)
        deb = next(aside.glob(f"{package}_*.deb"))
        run(["dpkg-deb", "-x", deb.name, "files"], package, aside)
        os.replace(aside / "files", root)
        shutil.rmtree(aside)
    return root


def run(command: list[str], package: str, folder: Path) -> None:
    try:
        done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    except FileNotFoundError:
        raise UserError(
            f"{command[0]} is missing: the corpus is made of packages of Debian 12; run this there"
        ) from None
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"{command[0]} failed with the package '{package}' of Debian 12 ({said}); "
            "check the network, run apt-get update, then the same again: it goes on from here"
        )


def read(path: Path) -> str:
    blob = path.read_bytes()
    if path.suffix in {".gz", ".dz"}:
        blob = gzip.decompress(blob)
    return blob.decode("utf8", "replace")


def documents(packages: list[str], pattern: str, convert: Callable[[str], str], cut: int, cache: Path) -> Iterator[str]:
    wanted = re.compile(pattern)
    for package in packages:
        root = unpack(package, cache)
        for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and wanted.search(str(p))):
            text = convert(read(path))
            step = cut or len(text) or 1
            yield from (text[i : i + step] for i in range(0, len(text), step))


def kernel(cache: Path) -> Iterator[str]:
    """The C files of some folders of the kernel's source."""
    root = unpack("linux-source-6.1", cache)
    tree = cache / "linux-tree"
    if not tree.exists():
        aside = cache / ".linux-tree.part"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        folders = [f"linux-source-6.1/{d}" for d in ("kernel", "mm", "fs", "lib", "block", "crypto")]
        archive = next(root.rglob("linux-source-*.tar.xz")).resolve()
        run(["tar", "-xf", str(archive), *folders], "linux-source-6.1", aside)
        os.replace(aside, tree)
    return (read(path) for path in sorted(tree.rglob("*.[ch]")))


class Corpus:
    """Documents, each once, as lines of JSON with the hash of their text."""

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._rows: list[tuple[str, str]] = []

    def take(self, name: str, category: str, texts: Iterable[str]) -> None:
        size = 0
        for text in texts:
            key = hashlib.sha1(text.encode("utf8", "replace")).hexdigest()
            if len(text) < 200 or key in self._seen:
                continue
            self._seen.add(key)
            size += len(text.encode("utf8", "replace"))
            row = {"id": key[:16], "text": text, "source": name, "category": category}
            self._rows.append((key, json.dumps(row, ensure_ascii=False)))
        print(f"{name:20s} {category:12s} {size / 1e6:8.2f} MB", file=sys.stderr)

    def write(self, out: Path) -> None:
        self._rows.sort()
        random.Random(0).shuffle(self._rows)
        for split, keep in (("train", False), ("valid", True)):
            rows = [row for key, row in self._rows if (int(key[-4:], 16) % 100 == 0) == keep]
            path = out / f"{split}.jsonl"
            with whole_file(path) as aside:
                aside.write_text("\n".join(rows) + "\n", encoding="utf8", errors="replace")
            print(f"{split}: {len(rows)} documents, {path.stat().st_size / 1e6:.1f} MB", file=sys.stderr)


def build(out: Path, wanted: set[str], cache: Path, with_kernel: bool) -> None:
    """Write `out`/train.jsonl and `out`/valid.jsonl.

    Raises:
        UserError: a category is unknown, a package cannot be had, or a folder cannot be written.
    """
    if unknown := sorted(wanted - set(CATEGORIES)):
        raise UserError(f"--only: '{unknown[0]}' is unknown; it takes {', '.join(CATEGORIES)}")
    for folder in (out, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"'{folder}' cannot be written: {error.strerror}") from None
    corpus = Corpus()
    for name, category, packages, pattern, convert, cut in SOURCES:
        if category in wanted:
            corpus.take(name, category, documents(packages, pattern, convert, cut, cache))
    if "prose" in wanted:
        corpus.take("austen", "prose", austen(unpack(AUSTEN, cache)))
    if with_kernel and "code" in wanted:
        corpus.take("kernel-c", "code", kernel(cache))
    corpus.write(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--only", metavar="CATEGORIES", default=",".join(CATEGORIES))
    parser.add_argument("--cache", metavar="DIR", type=Path, default=Path("/tmp/corpus-debs"))
    parser.add_argument("--kernel", action="store_true", help="also parts of linux-source-6.1 (about 70 MB)")
    arguments = parser.parse_args()
    build(arguments.out, set(arguments.only.split(",")), arguments.cache, arguments.kernel)


if __name__ == "__main__":
    guarded(main)
