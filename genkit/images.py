"""PNG files that carry text and give it back; contact sheets."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

from genkit.files import write_atomic

CELL_MIN, CELL_MAX = 96, 256  # side of a sheet's cell in pixels: small pictures are enlarged so that their labels can be read
SHEET_PIXELS = 40_000_000
_PAPER, _TEXT, _MISSING = (255, 255, 255), (30, 30, 30), (225, 225, 225)


def save_png(image: Image.Image, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write a picture with text chunks, atomically. The bytes depend on picture and text alone.

    Args:
        text: chunks by keyword (1 to 79 Latin-1 characters); any Unicode text.

    Raises:
        OSError: see `write_atomic`.
    """
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_atomic(path, buffer.getvalue())


def read_text(path: Path) -> dict[str, str]:
    """The text chunks that precede a PNG's pixels. The pixels are not decoded, so the picture's size does not matter.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a PNG, or its text is broken or longer than a megabyte.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            return {key: value for key, value in image.info.items() if isinstance(key, str) and isinstance(value, str)}
    except FileNotFoundError:
        raise FileNotFoundError(f"There is no file {str(path)!r}.") from None
    except (UnidentifiedImageError, IsADirectoryError, SyntaxError, ValueError, EOFError, OSError) as error:
        raise ValueError(f"{str(path)!r} is not a PNG that can be read ({error}). Give a picture that genkit wrote.") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{str(path)!r} claims to be larger than genkit reads ({error}).") from error


def with_boxes(picture: Image.Image, boxes: Sequence[Sequence[float]], texts: Sequence[str], side: int = 320) -> Image.Image:
    """A picture with boxes drawn on it, enlarged by a whole number to about `side` pixels where it is smaller.

    Args:
        boxes: x0, y0, x1, y1 in pixels of the picture.
        texts: one for each.
    """
    import torch
    from torchvision.transforms.functional import pil_to_tensor, to_pil_image
    from torchvision.utils import draw_bounding_boxes

    scale = max(1, round(side / max(picture.size)))
    picture = picture.convert("RGB").resize((picture.width * scale, picture.height * scale))
    if not len(boxes):
        return picture
    places = torch.tensor([list(box) for box in boxes]) * scale
    drawn = draw_bounding_boxes(
        pil_to_tensor(picture), places, list(texts), colors="red", width=2, label_colors="white", fill_labels=True
    )
    return to_pil_image(drawn)


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
) -> Image.Image:
    """A table of pictures with labels, on white.

    Args:
        rows: pictures, R rows of up to C; None (it failed) is drawn as a crossed grey field.
        row_labels, column_labels: R and C texts; all empty takes no space.
        title: a line on top.

    Raises:
        ValueError: no pictures, or rows that do not fit the labels.

    Example:
        >>> contact_sheet([[a, b], [c, d]], ["cfg 1", "cfg 3"], ["seed 0", "seed 1"])
    """
    count_r, count_c = len(rows), len(column_labels)
    if not count_r or not count_c or len(row_labels) != count_r or any(len(row) > count_c for row in rows):
        shape = [len(row) for row in rows]
        raise ValueError(f"The labels are for {len(row_labels)} rows of at most {count_c} pictures, but the rows have {shape}.")
    present = [image for row in rows for image in row if image is not None]
    width, height = _cell(present, count_r * count_c)
    font = ImageFont.load_default(max(10, min(16, width // 8)))
    line = round(font.size * 1.4) if isinstance(font, ImageFont.FreeTypeFont) else 14
    gap = 4
    labels = [_wrap(text, font, 2 * CELL_MIN, max(1, height // line)) for text in row_labels]
    left = max((round(font.getlength(part)) for text in labels for part in text), default=0)
    left += 2 * gap if left else 0
    columns = [_wrap(text, font, width, 3) for text in column_labels]
    heading = _wrap(title, font, left + count_c * (width + gap), 2)
    top_title = line * len(heading) + (gap if heading else 0)
    top = top_title + line * max(len(text) for text in columns) + gap
    sheet = Image.new("RGB", (left + count_c * (width + gap) + gap, top + count_r * (height + gap)), _PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.multiline_text((gap, gap // 2), "\n".join(heading), _TEXT, font)
    for c, text in enumerate(columns):
        pen.multiline_text((left + gap + c * (width + gap), top_title), "\n".join(text), _TEXT, font)
    for r, (row, text) in enumerate(zip(rows, labels, strict=True)):
        y = top + r * (height + gap)
        pen.multiline_text((gap, y), "\n".join(text), _TEXT, font)
        for c, image in enumerate(row):
            x = left + gap + c * (width + gap)
            if image is None:
                pen.rectangle((x, y, x + width - 1, y + height - 1), _MISSING)
                pen.line((x, y, x + width - 1, y + height - 1), _TEXT)
                pen.line((x, y + height - 1, x + width - 1, y), _TEXT)
            else:
                sheet.paste(_fit(image, width, height), (x, y))
    return sheet


def _cell(images: Sequence[Image.Image], count: int) -> tuple[int, int]:
    """Width and height of every cell, in the shape of the largest picture."""
    width, height = max((image.size for image in images), key=lambda s: s[0] * s[1], default=(CELL_MIN, CELL_MIN))
    side = min(CELL_MAX, max(CELL_MIN, width, height), math.isqrt(SHEET_PIXELS // count))
    # Whole multiples keep small pictures crisp.
    scale = side // max(width, height) or side / max(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _fit(image: Image.Image, width: int, height: int) -> Image.Image:
    enlarges = width >= image.width
    return image.convert("RGB").resize((width, height), Image.Resampling.NEAREST if enlarges else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int, lines: int) -> list[str]:
    """The text in at most `lines` lines of at most `width` pixels; what does not fit ends in an ellipsis."""
    wrapped: list[str] = []
    for word in text.split():
        if wrapped and font.getlength(f"{wrapped[-1]} {word}") <= width:
            wrapped[-1] += f" {word}"
        else:
            wrapped.append(word)
    cut = wrapped[:lines]
    if len(wrapped) > lines:
        cut[-1] += " ..."
    for i, part in enumerate(cut):
        while font.getlength(part) > width and len(part) > 4:
            part = part[:-4] + "..."
        cut[i] = part
    return cut
