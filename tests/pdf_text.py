"""The words of a PDF that chromium has printed, page by page: enough of the format for that, and no more.

Its texts are codes of a font's glyphs; what letter a glyph is stands in the font's ToUnicode table.
"""

import re
import zlib
from pathlib import Path

OBJECT = re.compile(rb"(?:^|[\r\n])(\d+) 0 obj\b(.*?)\bendobj", re.S)
WORDS = re.compile(
    rb"\[(.*?)\]\s*TJ|(<[0-9A-Fa-f\s]*>)\s*Tj|/(\w+)\s+[\d.]+\s+Tf|/(\w+)\s+Do|\b(ET)\b"
)


def objects(pdf):
    "Number → what an object says."
    return {int(number): body for number, body in OBJECT.findall(pdf)}


def stream(body):
    "What an object's stream holds."
    raw = re.search(rb"stream\r?\n(.*?)\r?\nendstream", body, re.S)[1]
    return zlib.decompress(raw) if b"/FlateDecode" in body else raw


def letters(table):
    "Glyph → letters, of a ToUnicode table."
    found = {}
    text = lambda code: bytes.fromhex(code.decode()).decode("utf-16-be")
    for part in re.findall(rb"beginbfchar(.*?)endbfchar", table, re.S):
        for glyph, code in re.findall(rb"<(\w+)>\s*<(\w+)>", part):
            found[int(glyph, 16)] = text(code)
    for part in re.findall(rb"beginbfrange(.*?)endbfrange", table, re.S):
        for first, last, code in re.findall(rb"<(\w+)>\s*<(\w+)>\s*<(\w+)>", part):
            for step in range(int(last, 16) - int(first, 16) + 1):
                found[int(first, 16) + step] = chr(ord(text(code)) + step)
    return found


def named(known, body, kind):
    "Name → number of the fonts or forms that an object uses."
    inside = re.search(rb"/%s\s*<<(.*?)>>" % kind, body, re.S)
    if not inside and (there := re.search(rb"/Resources\s+(\d+) 0 R", body)):
        inside = re.search(rb"/%s\s*<<(.*?)>>" % kind, known[int(there[1])], re.S)
    pairs = re.findall(rb"/(\w+)\s+(\d+) 0 R", inside[1]) if inside else []
    return {name: int(number) for name, number in pairs}


def drawn(known, content, body):
    "The text that a content stream draws with an object's fonts and forms; a space between pieces."
    tables, forms, said, font = {}, named(known, body, b"XObject"), [], {}
    for name, number in named(known, body, b"Font").items():
        if there := re.search(rb"/ToUnicode\s+(\d+) 0 R", known[number]):
            tables[name] = letters(stream(known[int(there[1])]))
    for many, one, chosen, form, end in WORDS.findall(content):
        if chosen:
            font = tables.get(chosen, {})
        elif form in forms and b"/Subtype /Form" in known[forms[form]]:
            of = known[forms[form]]
            said.append(drawn(known, stream(of), of))
        elif end:
            said.append(" ")
        for codes in re.findall(rb"<([0-9A-Fa-f\s]*)>", many or one):
            codes = re.sub(rb"\s", b"", codes)
            glyphs = (int(codes[i : i + 4], 16) for i in range(0, len(codes), 4))
            said.append("".join(font.get(glyph, "?") for glyph in glyphs))
    return "".join(said)


def pages_of(pdf):
    "The text of every page of a PDF, in order."
    known = objects(Path(pdf).read_bytes() if not isinstance(pdf, bytes) else pdf)
    (tree,) = [b for b in known.values() if b"/Type /Catalog" in b]

    def leaves(number):
        body = known[number]
        if b"/Kids" not in body:
            yield body
            return
        for kid in re.findall(rb"(\d+) 0 R", re.search(rb"/Kids\s*\[(.*?)\]", body, re.S)[1]):
            yield from leaves(int(kid))

    texts = []
    for page in leaves(int(re.search(rb"/Pages\s+(\d+) 0 R", tree)[1])):
        (content,) = re.findall(rb"/Contents\s+(\d+) 0 R", page)
        texts.append(drawn(known, stream(known[int(content)]), page))
    return texts
