#!/usr/bin/env python3
"""Build a real text corpus (about 330 MB: prose, documentation, code, 11 languages) from Debian packages.

    build_corpus.py OUT_DIR [--only prose,docs,multilingual,code] [--cache DIR] [--kernel]
    build_corpus.py OUT_DIR --speedrun [--snapshot] [--cache DIR]
    build_corpus.py OUT_DIR --permissive [--only prose,docs,multilingual,code] [--cache DIR]

Writes OUT_DIR/train.jsonl and OUT_DIR/valid.jsonl, one {"id", "text", "source", "category"} a line, shuffled with a
fixed seed; about 1 % of the documents, chosen by a hash of their text, are validation. Needs apt-get and dpkg-deb;
nothing is installed. The texts keep their own licences (GPL, GFDL, CC-BY-SA, MPL, public domain): fetch them, do not
commit them. `xz -T2 -6` packs the whole to about 60 MB.

--speedrun writes the text of `blt speedrun`, byte for byte, from the versions of packages that it was made of:
train.jsonl holds the first 30,222 of the documents for training, tune.jsonl the next 600. --snapshot takes these
versions from Debian's archive of the past, once newer ones have replaced them.

--permissive keeps only what is in the public domain or under a permissive licence, and adds more of that: about 75 MB,
each row with its "licence". Models trained on it may be passed on; setup/train_tiny.py does so.
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
from bytelatent.files import digest_of, whole_file
from bytelatent.study import speedrun_text

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

BIBLES = {"world-english-bible": ("prose", "sword-text-web"), "reina-valera": ("multilingual", "sword-text-sparv")}
# What --permissive keeps, as the packages' own files of copyright state it.
LICENCES = {
    **dict.fromkeys(("austen", "devils-dictionary", "jargon-file", "sqlite-doc", *BIBLES), "public domain"),
    **dict.fromkeys(("python-doc", "py-stdlib", "py-tests"), "PSF-2.0"),
    "apache-manual": "Apache-2.0",
    "go-stdlib": "BSD-3-Clause",
    "postgresql-doc": "PostgreSQL licence",
}
GO = (
    "bufio|bytes|container|context|encoding|errors|flag|fmt|go|io|log|net|os|path|regexp|sort|strconv|strings|sync|text"
)
PERMISSIVE = [  # beside those of SOURCES
    ("devils-dictionary", "prose", ["dict-devil"], r"\.dict\.dz$", plain, 16384),
    ("jargon-file", "prose", ["dict-jargon"], r"\.dict\.dz$", plain, 16384),
    ("apache-manual", "multilingual", ["apache2-doc"], r"manual/[a-z-]+/.*\.html$", from_html, 0),
    ("sqlite-doc", "docs", ["sqlite3-doc"], r"\.html$", from_html, 0),
    ("postgresql-doc", "docs", ["postgresql-doc-15"], r"\.html$", from_html, 0),
    ("go-stdlib", "code", ["golang-1.19-src"], rf"/src/({GO})/(?!.*(testdata|zerrors|_bundle)).*\.go$", plain, 0),
]


def bible(root: Path) -> Iterator[str]:
    """Yield the books of a SWORD module: blocks of zlib, each at an offset and of a size that the .bzs file lists."""
    for index in sorted(root.rglob("*.bzs"), reverse=True):  # the Old Testament first
        blocks = index.with_suffix(".bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index.read_bytes()):
            book = zlib.decompress(blocks[start : start + size]).decode("utf8", "replace")
            book = re.sub(r"<note.*?</note>", "", book, flags=re.S)
            text = re.sub(r"<[^>]+>", "", re.sub(r"<(chapter|lb|milestone|/?p|/?div|/?title)\b[^>]*>", "\n", book))
            text = re.sub(r"[ \t]+", " ", re.sub(r"\s*\n\s*", "\n", html.unescape(text))).strip()
            yield from (text[i : i + 20000] for i in range(0, len(text), 20000))


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


class Packages:
    """Unpacked packages, downloaded unless the cache has them.

    Args:
        versions: by package; None for the newest ones that apt knows.
        snapshot: take them from Debian's archive as it was on `speedrun_text.SNAPSHOT`.
    """

    def __init__(self, cache: Path, versions: dict[str, str] | None = None, snapshot: bool = False) -> None:
        self.cache, self.versions, self.is_snapshot = cache, versions, snapshot
        # As the user who calls, for apt's own may not write here.
        self.options = ["-o", "APT::Sandbox::User=root"]
        if versions is not None:  # some packages differ between machines
            self.options += ["-o", "APT::Architecture=amd64", "-o", "APT::Architectures=amd64"]

    def folder(self, package: str) -> Path:
        """The folder with a package's files.

        Raises:
            UserError: apt-get is missing, or cannot download the package.
        """
        name = package if self.versions is None else f"{package}={self.versions[package]}"
        root = self.cache / name
        if not root.exists():
            if self.is_snapshot:
                self._read_snapshot()
            aside = self.cache / f".{package}.part"
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir()
            way_out = "" if self.versions is None or self.is_snapshot else "; --snapshot has versions that are gone"
            run(["apt-get", "-qq", *self.options, "download", name], name, aside, way_out)
            deb = next(aside.glob(f"{package}_*.deb"))
            run(["dpkg-deb", "-x", deb.name, "files"], name, aside)
            os.replace(aside / "files", root)
            shutil.rmtree(aside)
        return root

    def _read_snapshot(self) -> None:
        """Let apt read the lists of the snapshot, below the cache, once."""
        place = self.cache.resolve() / "snapshot"
        self.options += ["-o", f"Dir::Etc::sourcelist={place / 'sources.list'}", "-o", "Dir::Etc::sourceparts=-"]
        self.options += ["-o", f"Dir::State::lists={place / 'lists'}", "-o", f"Dir::Cache={place / 'cache'}"]
        self.is_snapshot = False
        for inner in ("lists/partial", "cache"):
            (place / inner).mkdir(parents=True, exist_ok=True)
        with whole_file(place / "sources.list") as aside:
            aside.write_text("".join(f"{line}\n" for line in speedrun_text.SNAPSHOT))
        run(["apt-get", "-qq", *self.options, "update"], "the lists of the snapshot", place)


def run(command: list[str], package: str, folder: Path, way_out: str = "") -> None:
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
            f"check the network, run apt-get update, then the same again: it goes on from here{way_out}"
        )


def read(path: Path) -> str:
    blob = path.read_bytes()
    if path.suffix in {".gz", ".dz"}:
        blob = gzip.decompress(blob)
    return blob.decode("utf8", "replace")


def documents(
    names: list[str], pattern: str, convert: Callable[[str], str], cut: int, found: Packages
) -> Iterator[str]:
    wanted = re.compile(pattern)
    for package in names:
        root = found.folder(package)
        for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink() and wanted.search(str(p))):
            text = convert(read(path))
            step = cut or len(text) or 1
            yield from (text[i : i + step] for i in range(0, len(text), step))


def kernel(packages: Packages) -> Iterator[str]:
    """The C files of some folders of the kernel's source."""
    root = packages.folder("linux-source-6.1")
    cache = packages.cache
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
    """Documents, each once, as lines of JSON with the hash of their text.

    Args:
        licences: by source, for a row's "licence"; other sources are left out. None: all sources, and none is stated.

    Attributes:
        digests: the first digits of SHA-256 of the hashes of a source's documents, in order.
    """

    def __init__(self, licences: dict[str, str] | None = None) -> None:
        self.licences = licences
        self.digests: dict[str, str] = {}
        self._seen: set[str] = set()
        self._rows: list[tuple[str, str]] = []

    def take(self, name: str, category: str, texts: Iterable[str]) -> None:
        if self.licences is not None and name not in self.licences:
            return
        stated = {} if self.licences is None else {"licence": self.licences[name]}
        size, digest = 0, hashlib.sha256()
        for text in texts:
            key = hashlib.sha1(text.encode("utf8", "replace")).hexdigest()
            if len(text) < 200 or key in self._seen:
                continue
            self._seen.add(key)
            digest.update(key.encode())
            size += len(text.encode("utf8", "replace"))
            row = {"id": key[:16], "text": text, "source": name, "category": category} | stated
            self._rows.append((key, json.dumps(row, ensure_ascii=False)))
        self.digests[name] = digest.hexdigest()[:16]
        print(f"{name:20s} {category:12s} {size / 1e6:8.2f} MB  {self.digests[name]}", file=sys.stderr)

    def write(self, out: Path, cuts: list[tuple[str, int]] | None = None) -> dict[str, str]:
        """Write the held-out documents and the others, shuffled.

        Args:
            cuts: the files that divide the others, each with its number of documents; what is left over is not
                written. None: all in train.jsonl.

        Returns:
            SHA-256 by file.
        """
        self._rows.sort()
        random.Random(0).shuffle(self._rows)
        parts = [[row for key, row in self._rows if (int(key[-4:], 16) % 100 == 0) == held_out] for held_out in (0, 1)]
        found, at = {}, 0
        for name, count in cuts or [("train.jsonl", len(parts[0]))]:
            found[name] = self._write(out / name, parts[0][at : at + count])
            at += count
        return found | {"valid.jsonl": self._write(out / "valid.jsonl", parts[1])}

    def _write(self, path: Path, rows: list[str]) -> str:
        with whole_file(path) as aside:
            aside.write_text("\n".join(rows) + "\n", encoding="utf8", errors="replace")
        size, digest = digest_of(path)
        print(f"{path.stem}: {len(rows)} documents, {int(size) / 1e6:.1f} MB, sha256 {digest}", file=sys.stderr)
        return str(digest)


def build(
    out: Path,
    wanted: set[str],
    cache: Path,
    with_kernel: bool = False,
    speedrun: bool = False,
    snapshot: bool = False,
    permissive: bool = False,
) -> None:
    """Write `out`/train.jsonl and `out`/valid.jsonl; the speedrun's have a tune.jsonl beside them.

    Raises:
        UserError: a category is unknown, a package cannot be had, or a folder cannot be written; or the text is not
            that of the speedrun.
    """
    if unknown := sorted(wanted - set(CATEGORIES)):
        raise UserError(f"--only: '{unknown[0]}' is unknown; it takes {', '.join(CATEGORIES)}")
    if speedrun and (with_kernel or wanted != set(CATEGORIES)):
        raise UserError("--speedrun: its text is of all categories and without the kernel; leave --only, --kernel out")
    if snapshot and not speedrun:
        raise UserError("--snapshot: it is for the versions of --speedrun; give that too, or leave it out")
    if permissive and (with_kernel or speedrun):
        raise UserError("--permissive: the kernel and the text of the speedrun hold other licences; leave them out")
    for folder in (out, cache):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"'{folder}' cannot be written: {error.strerror}") from None
    packages = Packages(cache, speedrun_text.PACKAGES if speedrun else None, snapshot)
    corpus = Corpus(LICENCES if permissive else None)
    for name, category, names, pattern, convert, cut in [*SOURCES, *(PERMISSIVE if permissive else ())]:
        if category in wanted:
            corpus.take(name, category, documents(names, pattern, convert, cut, packages))
    if "prose" in wanted:
        corpus.take("austen", "prose", austen(packages.folder(AUSTEN)))
    for name, (category, package) in BIBLES.items() if permissive else ():
        if category in wanted:
            corpus.take(name, category, bible(packages.folder(package)))
    if with_kernel and "code" in wanted:
        corpus.take("kernel-c", "code", kernel(packages))
    if not speedrun:
        corpus.write(out)
        return
    written = corpus.write(out, list(speedrun_text.CUTS.items()))
    wrong = [name for name, digest in speedrun_text.PARTS.items() if written[name] != digest]
    if wrong:
        others = [name for name, digest in speedrun_text.SOURCES.items() if corpus.digests[name] != digest]
        raise UserError(
            f"'{out}' holds another text than that of the speedrun ({', '.join(wrong)}), and no score counts on it: "
            f"{', '.join(others) or 'no source'} differs; remove that from '{cache}' and build again, with Python "
            f"{speedrun_text.PYTHON}, whose parser of HTML read it"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", metavar="OUT_DIR", type=Path)
    parser.add_argument("--only", metavar="CATEGORIES", default=",".join(CATEGORIES))
    parser.add_argument("--cache", metavar="DIR", type=Path, default=Path("/tmp/corpus-debs"))
    parser.add_argument("--kernel", action="store_true", help="also parts of linux-source-6.1 (about 70 MB)")
    parser.add_argument("--speedrun", action="store_true", help="the text of blt speedrun, checked by its digests")
    parser.add_argument("--snapshot", action="store_true", help="take its packages from snapshot.debian.org")
    parser.add_argument("--permissive", action="store_true", help="only permissive licences and the public domain")
    given = vars(parser.parse_args())
    given |= {"wanted": set(given.pop("only").split(",")), "with_kernel": given.pop("kernel")}
    build(**given)


if __name__ == "__main__":
    guarded(main)
