"""PNG files and their text, atomic writes, contact sheets, galleries."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genkit import images
from genkit.files import prepare_folder, write_atomic
from genkit.gallery import Gallery
from genkit.images import contact_sheet, read_text, save_png
from genkit.recipe import Recipe, read_recipe
from genkit.runner import Outcome
from genkit.sweep import plan

RED = Image.new("RGB", (8, 8), (255, 0, 0))


def outcome(recipe: Recipe, image: Image.Image | None = RED) -> Outcome:
    return Outcome(recipe, image, None if image else "it failed", 0.5, {"class": "S", "config": {}})


class TestFiles:
    def test_a_failed_write_leaves_the_old_file_and_no_other(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = tmp_path / "a.txt"
        write_atomic(path, b"old")

        def fail(handle: int) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_atomic(path, b"new")
        assert path.read_bytes() == b"old"
        assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]

    def test_folders_are_tried(self, tmp_path: Path) -> None:
        prepare_folder(tmp_path / "a" / "b")
        assert list((tmp_path / "a" / "b").iterdir()) == []
        (tmp_path / "file").write_text("")
        for path in (tmp_path / "file", tmp_path / "file" / "below"):
            with pytest.raises(NotADirectoryError, match="is or lies below a file"):
                prepare_folder(path)

    @pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write, as /proc is on Linux")
    def test_a_folder_that_nobody_can_write(self) -> None:
        with pytest.raises(OSError, match="cannot be written"):
            prepare_folder(Path("/proc/self"))


class TestText:
    def test_text_comes_back_and_pixels_are_kept(self, tmp_path: Path) -> None:
        path = tmp_path / "a.png"
        text = {"genkit": "{}", "parameters": "\u4e03 \u00e9\nSteps: 3"}
        save_png(RED, path, text)
        assert read_text(path) == text
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(RED))

    def test_same_image_and_text_are_the_same_bytes(self, tmp_path: Path) -> None:
        for name in "ab":
            save_png(RED, tmp_path / name, {"genkit": "{}"})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()

    def test_what_is_no_png_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="There is no file"):
            read_text(tmp_path / "missing.png")
        (tmp_path / "text.png").write_text("hello")
        RED.save(tmp_path / "jpeg.png", "JPEG")
        (tmp_path / "empty.png").write_bytes(b"")
        (tmp_path / "magic.png").write_bytes(b"\x89PNG\r\n\x1a\n")
        for name in ("text.png", "jpeg.png", "empty.png", "magic.png"):
            with pytest.raises(ValueError, match="is not a PNG that can be read"):
                read_text(tmp_path / name)
        with pytest.raises(ValueError, match="is not a PNG"):
            read_text(tmp_path)

    def test_huge_pictures_and_texts_are_refused_without_being_decoded(self, tmp_path: Path) -> None:
        path = tmp_path / "bomb.png"
        header = struct.pack(">IIBBBBB", 10**6, 10**6, 8, 2, 0, 0, 0)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b""))
        with pytest.raises(ValueError, match=r"larger than genkit reads|not a PNG"):
            read_text(path)
        header = struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)
        bomb = b"genkit\0\0" + zlib.compress(b"[" * 5_000_000)
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"zTXt", bomb) + chunk(b"IDAT", b""))
        with pytest.raises(ValueError, match="not a PNG that can be read"):
            read_text(path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


class TestContactSheet:
    def test_pictures_are_where_they_belong(self) -> None:
        colors = [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (9, 9, 9)]]
        rows = [[Image.new("RGB", (16, 16), color) for color in row] for row in colors]
        sheet = np.asarray(contact_sheet(rows, ["", ""], ["", ""]))
        ys, xs = [20, 120], [20, 120]
        assert [[tuple(sheet[y, x]) for x in xs] for y in ys] == colors

    def test_labels_take_space_and_ink(self) -> None:
        bare = contact_sheet([[RED]], [""], [""])
        labelled = contact_sheet([[RED]], ["a long row label"], ["seed 0"], "a title")
        assert labelled.width > bare.width
        assert labelled.height > bare.height
        assert (np.asarray(labelled)[:20] < 100).any()

    def test_missing_pictures_and_short_rows(self) -> None:
        sheet = np.asarray(contact_sheet([[None, RED], [RED]], ["", ""], ["", ""]))
        assert tuple(sheet[20, 40]) == (225, 225, 225)
        assert tuple(sheet[-20, -20]) == (255, 255, 255)

    def test_all_missing(self) -> None:
        assert contact_sheet([[None]], ["a"], ["b"]).width > 0

    def test_large_pictures_and_many_are_shrunk(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert contact_sheet([[Image.new("RGB", (2000, 1000))]], [""], [""]).size == (264, 136)
        monkeypatch.setattr(images, "SHEET_PIXELS", 100_000)
        big = contact_sheet([[RED] * 20] * 10, [""] * 10, [""] * 20)
        assert big.width * big.height < 200_000

    def test_shapes_must_agree(self) -> None:
        with pytest.raises(ValueError, match="labels are for 1 rows"):
            contact_sheet([[RED, RED]], ["a"], ["b"])
        with pytest.raises(ValueError, match="rows"):
            contact_sheet([], [], [])


class TestGallery:
    def test_an_image_carries_its_recipe(self, tmp_path: Path) -> None:
        gallery, recipe = Gallery(tmp_path / "new"), Recipe(prompt="\u4e03", seed=3)
        assert not gallery.has(recipe)
        path = gallery.save(outcome(recipe), device="cpu")
        assert gallery.has(recipe)
        assert read_recipe(path) == recipe
        assert read_text(path)["parameters"].startswith("\u4e03\nSteps: 30")
        assert sorted(p.suffix for p in path.parent.iterdir()) == [".json", ".png"]

    def test_only_whole_pairs_of_the_same_recipe_count(self, tmp_path: Path) -> None:
        gallery, recipe = Gallery(tmp_path), Recipe(prompt="a")
        path = gallery.save(outcome(recipe), device="cpu")
        sidecar = path.with_suffix(".json")
        whole = sidecar.read_text()
        for broken in ("", "[]", whole[:50], whole.replace(recipe.hash, "0" * 12)):
            sidecar.write_text(broken)
            assert not gallery.has(recipe)
        sidecar.write_text(whole)
        assert gallery.has(recipe)
        path.unlink()
        assert not gallery.has(recipe)

    def test_a_failed_outcome_is_not_saved(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="it failed"):
            Gallery(tmp_path).save(outcome(Recipe(prompt="a"), None), device="cpu")

    def test_the_sheet_shows_what_is_there(self, tmp_path: Path) -> None:
        gallery, table = Gallery(tmp_path), plan([Recipe(prompt="a")], [0, 1])
        gallery.save(outcome(table.recipes[1]), device="cpu")
        pixels = np.asarray(Image.open(gallery.save_sheet(table)))
        assert (pixels == (255, 0, 0)).all(-1).sum() == 96 * 96
        assert (pixels == (225, 225, 225)).all(-1).any()


@pytest.mark.parametrize("text", [None, "{", "[]", '{"steps": "x"}', '{"evil": 1}'])
def test_a_png_without_a_usable_recipe_names_the_file(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "a.png"
    save_png(RED, path, None if text is None else {"genkit": text})
    with pytest.raises(ValueError, match=r"a\.png"):
        read_recipe(path)
