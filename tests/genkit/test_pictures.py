"""Image files of every kind: found, read, resized."""

from __future__ import annotations

import contextlib
from pathlib import Path

import numpy as np
import PIL
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

from genkit.data.pictures import ALPHA, FRAMES, find_pictures, fit_picture, read_picture, to_rgb
from genkit.images import save_png
from genkit.recipe import CHUNK, Recipe

GRADIENT = np.linspace(0, 255, 48).round().astype(np.uint8).reshape(1, 48, 1).repeat(32, 0).repeat(3, 2)


def read(file: Path) -> np.ndarray:
    return np.asarray(read_picture(file)[0]).astype(int)


class TestFind:
    @pytest.fixture
    def folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        for name in ("b.png", "a.JPG", "sub/deep/c.tiff", "sub/d.webp", "notes.txt", ".hidden.png", "odd"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    def names(self, *paths: str | Path) -> list[str]:
        return [file.as_posix() for file in find_pictures(paths)]

    def test_folders_patterns_and_files(self, folder: Path) -> None:
        assert self.names(Path()) == ["a.JPG", "b.png", "sub/d.webp", "sub/deep/c.tiff"]
        assert self.names("sub") == ["sub/d.webp", "sub/deep/c.tiff"]
        assert self.names("*.png") == ["b.png"]
        assert self.names("**/*.tiff") == ["sub/deep/c.tiff"]
        assert self.names("odd") == ["odd"]  # a name is taken at its word

    def test_order_is_that_of_the_arguments_and_each_file_comes_once(self, folder: Path) -> None:
        assert self.names("sub/d.webp", "b.png", "sub", folder)[:3] == ["sub/d.webp", "b.png", "sub/deep/c.tiff"]
        assert len(self.names("sub/d.webp", "sub", folder)) == 4

    def test_a_file_whose_name_looks_like_a_pattern(self, folder: Path) -> None:
        (folder / "x[1].png").write_bytes(b"x")
        assert self.names("x[1].png") == ["x[1].png"]

    def test_sheets_of_samples_are_no_samples(self, folder: Path) -> None:
        kept = ["a.JPG", "b.png", "grid.png", "sub/d.webp", "sub/deep/c.tiff", "sub/grid.png", "sub/heatmaps/00/x.png", "sub/x.png"]
        for name in ("grid.png", "sub/grid.png", "sub/heatmaps/00/x.png", "sub/x.png"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(b"x")
        assert self.names(Path()) == kept  # of anyone's
        save_png(Image.new("RGB", (8, 8)), folder / "sub/x.png", {CHUNK: Recipe(prompt="a").to_json()})
        assert self.names(Path()) == [name for name in kept if name not in ("sub/grid.png", "sub/heatmaps/00/x.png")]
        assert self.names("sub/heatmaps", "sub/grid.png") == ["sub/heatmaps/00/x.png", "sub/grid.png"]  # named, they count

    def test_what_is_not_there(self, folder: Path) -> None:
        (folder / "empty").mkdir()
        with pytest.raises(ValueError, match=r"'empty' holds no images \(\.png, "):
            find_pictures(["b.png", "empty"])
        with pytest.raises(FileNotFoundError, match=r"There is no file or folder 'nowhere\.png'"):
            find_pictures(["nowhere.png"])
        with pytest.raises(FileNotFoundError, match=r"No file matches 'q\*.png'"):
            find_pictures(["q*.png"])
        with pytest.raises(ValueError, match="There are no images"):
            find_pictures([])


class TestRead:
    @pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
    def test_formats(self, tmp_path: Path, suffix: str) -> None:
        file = tmp_path / f"a.{suffix}"
        Image.fromarray(GRADIENT).save(file)
        picture, notes = read_picture(file)
        assert picture.mode == "RGB"
        assert notes == []
        assert np.abs(read(file) - GRADIENT).max() <= 12  # JPEG and WebP lose a little

    @pytest.mark.parametrize(
        ("mode", "close"), [("1", 100), ("L", 1), ("P", 20), ("CMYK", 1), ("YCbCr", 2), ("HSV", 2)]
    )  # black and white, and 216 colours
    def test_modes(self, tmp_path: Path, mode: str, close: float) -> None:
        file = tmp_path / "a.tiff"
        image = to_rgb(Image.fromarray(GRADIENT).convert(mode))
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image).astype(int) - GRADIENT).mean() < close
        if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13:
            return  # Pillow does not read the TIFF that it writes (its issue 9770)
        if mode != "HSV":
            Image.fromarray(GRADIENT).convert(mode).save(file)
            assert np.array_equal(read(file), np.asarray(image))

    def test_jpeg_of_a_printer(self, tmp_path: Path) -> None:
        Image.fromarray(GRADIENT).convert("CMYK").save(tmp_path / "a.jpg")
        assert np.abs(read(tmp_path / "a.jpg") - GRADIENT).mean() < 4

    @pytest.mark.parametrize("name", ["a.png", "a.tiff"])
    def test_16_bits_are_scaled_and_not_clipped(self, tmp_path: Path, name: str) -> None:
        grey = GRADIENT[..., 0].astype(np.uint16) * 257
        Image.fromarray(grey).save(tmp_path / name)
        assert np.array_equal(read(tmp_path / name), GRADIENT)

    @pytest.mark.parametrize(("dtype", "mode"), [(np.float32, "F"), (np.int32, "I")])
    def test_pixels_without_a_white(self, tmp_path: Path, dtype: type, mode: str) -> None:
        Image.fromarray(np.full((4, 4), 70000, dtype)).save(tmp_path / "a.tiff")
        with pytest.raises(ValueError, match=rf"a.tiff' cannot be read \(pixels of mode {mode} have no defined white"):
            read_picture(tmp_path / "a.tiff")

    def test_transparency_is_put_on_white(self, tmp_path: Path) -> None:
        rgba = np.zeros((4, 4, 4), np.uint8)
        rgba[:, 2:, 3] = 255
        Image.fromarray(rgba).save(tmp_path / "a.png")
        picture, notes = read_picture(tmp_path / "a.png")
        assert notes == [ALPHA]
        assert np.asarray(picture)[0, :, 0].tolist() == [255, 255, 0, 0]

    @pytest.mark.parametrize("mode", ["P", "L"])
    def test_a_transparent_colour(self, tmp_path: Path, mode: str) -> None:
        image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
        if mode == "P":
            image = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8))
            image.putpalette([9, 9, 9, 0, 0, 0])
        image.save(tmp_path / "a.png", transparency=0)
        picture, notes = read_picture(tmp_path / "a.png")
        assert notes == [ALPHA]
        assert np.asarray(picture)[0, 0].tolist() == [255, 255, 255]
        assert np.asarray(picture)[0, 1].max() <= 1

    @pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tiff"])
    def test_of_an_animation_the_first_frame(self, tmp_path: Path, suffix: str) -> None:
        frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue", "lime")]
        frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:])
        picture, notes = read_picture(tmp_path / f"a.{suffix}")
        assert notes == [FRAMES]
        assert np.abs(np.asarray(picture).astype(int)[4, 4] - (255, 0, 0)).max() <= 4

    def test_exif_orientation(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its left side
        Image.fromarray(GRADIENT).save(tmp_path / "a.png", exif=exif)
        assert np.array_equal(read(tmp_path / "a.png"), np.rot90(GRADIENT, -1))

    @pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n", b"GIF89a\xff\xff\xff\xff"])
    def test_no_image(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"The image '.*a.png' cannot be read \(.+\)"):
            read_picture(tmp_path / "a.png")

    @pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
    def test_truncated_or_scrambled_files_never_crash_the_reader(self, tmp_path: Path, suffix: str) -> None:
        rng = np.random.default_rng(0)
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(tmp_path / f"whole.{suffix}")
        whole = (tmp_path / f"whole.{suffix}").read_bytes()
        file = tmp_path / f"a.{suffix}"
        file.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=rf"a.{suffix}' cannot be read"):
            read_picture(file)
        for _ in range(30):
            noisy = bytearray(whole)
            for i in rng.integers(0, min(200, len(whole)), 4):
                noisy[i] = int(rng.integers(256))
            file.write_bytes(noisy)
            with contextlib.suppress(ValueError):  # any other error fails
                assert read_picture(file)[0].mode == "RGB"

    @pytest.mark.parametrize("times", [1.5, 3], ids=["Pillow warns", "Pillow refuses"])
    def test_huge(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: float) -> None:
        Image.fromarray(GRADIENT).save(tmp_path / "a.png")
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(48 * 32 / times))
        with pytest.raises(ValueError, match=r"a.png' has more than 0 million pixels. Make it smaller"):
            read_picture(tmp_path / "a.png")

    def test_a_folder_is_no_image(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be read"):
            read_picture(tmp_path)


class TestFit:
    @pytest.mark.parametrize("size", [(100, 60), (60, 100), (61, 97), (20, 33), (32, 32), (33, 32)])
    def test_is_the_published_preprocessing(self, size: tuple[int, int]) -> None:
        """Short side to 32 by bicubic interpolation with antialiasing, then the centre, as torchvision has it."""
        image = Image.fromarray(np.random.default_rng(1).integers(0, 255, (*size, 3), dtype=np.uint8))
        theirs = tv.center_crop(tv.resize(image, [32], tv.InterpolationMode.BICUBIC), [32, 32])
        ours = (fit_picture(image, (32, 32)) + 1) * 127.5
        assert ours.shape == (3, 32, 32)
        # At the edge of the filter, rounding decides whether a grey level counts.
        difference = np.abs(ours.permute(1, 2, 0).numpy() - np.asarray(theirs))
        assert difference.max() <= 4
        assert (difference > 1).mean() < 0.01

    def test_other_shapes_and_channels(self) -> None:
        image = Image.fromarray(GRADIENT)
        assert fit_picture(image, (8, 24)).shape == (3, 8, 24)
        assert fit_picture(image.convert("L"), (8, 8)).shape == (1, 8, 8)
        assert fit_picture(Image.new("RGB", (30000, 1), "white"), (64, 64)).eq(1).all()

    def test_a_picture_of_the_right_size_is_not_touched(self) -> None:
        tensor = fit_picture(Image.fromarray(GRADIENT), (32, 48))
        assert torch.equal(((tensor + 1) * 127.5).round(), torch.from_numpy(GRADIENT).permute(2, 0, 1).float())
