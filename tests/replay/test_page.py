"""The report of a replay: one page that needs nothing else, and says what the tables say."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from eplb_triton.synthetic import serving_steps
from tests.commands import refused, run

SIZE = ("--gpus", 4, "--replicas", 16, "--replicas", 20)
VOID = {"meta", "br", "img"}


class Page(HTMLParser):
    """Elements and text of a page; an element that is closed in the wrong place is an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def attributes(self, name: str) -> Iterator[str]:
        for _, attributes in self.seen:
            if value := attributes.get(name):
                yield value

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page")
    steps = [step.numpy() for step in serving_steps(90, 3, 16, tokens_per_step=2000, top_k=4, seed=5)]
    np.save(folder / "<steps> & $x$.npy", np.stack(steps))
    return folder


@pytest.fixture(scope="module")
def body(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run("replay", folder / "<steps> & $x$.npy", *SIZE, "--json").out)
    return found


@pytest.fixture(scope="module")
def text(folder: Path) -> str:
    result = run("replay", folder / "<steps> & $x$.npy", *SIZE, "--report", folder / "page.html")
    assert (result.status, result.err) == (0, "")
    assert f"wrote {folder / 'page.html'}" in result.out
    return (folder / "page.html").read_text()


def test_the_page_says_what_the_json_says(body: dict[str, Any], text: str) -> None:
    page = Page(text)
    for sentence in body["verdict"]:
        assert sentence in page.text
    for deployment in body["deployments"]:
        for figures in deployment["splits"].values():
            assert f"{figures['par']:.3f}" in page.text
    for assumption in body["assumptions"]:
        assert assumption["source"] in page.text
    assert body["command"] in page.text


def test_the_page_needs_nothing_else(text: str) -> None:
    page = Page(text)
    names = {tag for tag, _ in page.seen}
    assert not names & {"script", "link", "iframe", "object", "embed", "img", "base"}
    for address in [*page.attributes("src"), *page.attributes("href"), *page.attributes("xlink:href")]:
        assert address.startswith(("#", "data:image/png;base64,")), address
    assert not re.search(r"@import|url\((?!#)", text)
    assert not [name for _, attributes in page.seen for name in attributes if name.startswith("on")]
    for address in re.findall(r"https?://[^\s\"'<]+", text):  # names of vocabularies, which nobody fetches
        assert address in ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    assert len(text) < 600_000


def test_the_page_follows_the_colours_of_its_reader_and_of_paper(text: str) -> None:
    assert "prefers-color-scheme: dark" in text
    assert "@media print" in text
    for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        assert "var(--ink)" in picture
        assert not re.search(r"#0[123]0[0-9a-f]{3}\b", picture), "a stand-in for a colour was left"
    used = set(re.findall(r"var\((--\w+)\)", text))
    assert used <= set(re.findall(r"(--\w+):", text))


def test_every_picture_is_well_formed_and_its_ids_are_its_own(text: str) -> None:
    pictures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(pictures) == 5
    ids: set[str] = set()
    for picture in pictures:
        root = ElementTree.fromstring(picture)
        mine = {element.get("id", "") for element in root.iter()} - {""}
        assert not ids & mine
        ids |= mine
        assert set(re.findall(r"url\(#([^)]*)\)", picture)) <= mine
        assert set(re.findall(r'href="#([^"]*)"', picture)) <= mine
        assert "width" not in root.attrib
        assert "viewBox" in root.attrib


def test_the_same_bytes_again(folder: Path, text: str) -> None:
    run("replay", folder / "<steps> & $x$.npy", *SIZE, "--report", folder / "again.html")
    assert (folder / "again.html").read_text() == text


def test_without_a_sweep_it_says_how_to_get_that_curve(folder: Path) -> None:
    arguments = ("--gpus", 4, "--policy", "deepseek", "--report", folder / "one.html")
    assert run("replay", folder / "<steps> & $x$.npy", *arguments).status == 0
    assert "Repeat --replicas to see where more of them stop to gain." in (folder / "one.html").read_text()


def test_the_command_on_the_page_finds_the_same(body: dict[str, Any]) -> None:
    again = json.loads(run(*shlex.split(body["command"])[1:], "--json").out)
    assert again["deployments"] == body["deployments"]
    assert again["command"] == body["command"]


def test_without_matplotlib_nothing_is_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    refused(
        run("replay", "missing.npy", *SIZE, "--report", folder / "x.html"), "--report needs matplotlib: pip install"
    )
