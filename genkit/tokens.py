"""Token files: the embedding vectors of a word that was learned, as diffusers and A1111 load them. Imports nothing heavy.

A file is safetensors of a few kB. With one text encoder it holds one tensor (n, D), whose key is the token, `<seven>`; with the two
of Stable Diffusion XL it holds `clip_l` and `clip_g`, and the header's metadata holds the token. A token of n vectors stands for
n tokens of the text encoder, `<seven>`, `<seven>_1`, ...
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genkit.checkpoints import PICKLES, read_shapes
from genkit.files import write_atomic

if TYPE_CHECKING:
    from torch import Tensor

MAX_BYTES = 16 * 2**20  # of a token file; real ones have a few kB
SDXL_KEYS = ("clip_l", "clip_g")
_METADATA = "genkit"  # key of the header under which the metadata is, as JSON


@dataclasses.dataclass(frozen=True)
class TokenFile:
    """A token file, checked.

    Args:
        path: where it is.
        token: what prompts say, for instance "<seven>".
        shapes: shape (n, D) or (D,) of each tensor.
        metadata: what the file says of its origin (model, guide, settings, accuracy); empty for files that others wrote.
        identity: token and content, "<seven>:1f2e3d4c5b6a"; two files of equal content have equal identities, wherever they lie.
    """

    path: Path
    token: str
    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, Any]
    identity: str


def token_of(name: str) -> str:
    """The token of a name: "<seven>" of "seven".

    Raises:
        ValueError: a name that is not 1 to 40 lower-case letters, digits and hyphens. (Tokenizers fold case, and "_1" is
            how further vectors are called.)
    """
    if not re.fullmatch(r"[a-z0-9](-?[a-z0-9]){0,39}", name):
        raise ValueError(f"The token name {name!r:.60} must be 1 to 40 lower-case letters and digits, with single hyphens between.")
    return f"<{name}>"


def read_token(path: str | Path) -> TokenFile:
    """Read and check a token file's header; its numbers are not loaded.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a pickle, not safetensors, truncated, too large, or it holds something else than a token.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no token file {str(path)!r}.")
    if path.suffix in PICKLES:
        raise ValueError(f"The token {str(path)!r} is a pickle, which can run code when it is loaded. Convert it to safetensors.")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"The token file {str(path)!r} is larger than {MAX_BYTES // 2**20} MB, so it is no token.")
    shapes = read_shapes(path)
    metadata = _read_metadata(path)
    if set(shapes) == set(SDXL_KEYS):
        token = metadata.get("token") or token_of(path.stem)
    elif len(shapes) == 1:
        token = next(iter(shapes))
    else:
        raise ValueError(f"{str(path)!r} holds {len(shapes)} tensors, but a token file holds one, or {' and '.join(SDXL_KEYS)}.")
    if not isinstance(token, str) or not re.fullmatch(r"[^\s\x00-\x1f\x7f]{1,100}", token):
        raise ValueError(f"The token file {str(path)!r} calls its token {token!r:.120}, which is no word. Rename it.")
    wrong = [shape for shape in shapes.values() if len(shape) not in (1, 2) or 0 in shape]
    if wrong:
        raise ValueError(f"{str(path)!r} holds a tensor of shape {wrong[0]}, but a token has shape (vectors, width).")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    return TokenFile(path, token, shapes, metadata, f"{token}:{digest}")


def write_token(path: Path, token: str, vectors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> None:
    """Write a token file, atomically.

    Args:
        vectors: (n, D) for each text encoder: by "" for one encoder, by "clip_l" and "clip_g" for two.
        metadata: JSON values.

    Raises:
        OSError: see `write_atomic`.
    """
    from safetensors.torch import save

    tensors = {key or token: value.detach().float().cpu().contiguous() for key, value in vectors.items()}
    # One key: safetensors writes several in any order, and equal content must give equal bytes.
    write_atomic(path, save(tensors, metadata={_METADATA: json.dumps({**metadata, "token": token}, sort_keys=True)}))


def load_vectors(file: TokenFile) -> dict[str, Tensor]:
    """The vectors (n, D) of a token file: by "" for one text encoder, by "clip_l" and "clip_g" for two."""
    from safetensors.torch import load_file

    tensors = {key: value.reshape(-1, value.shape[-1]) for key, value in load_file(file.path).items()}
    return tensors if set(tensors) == set(SDXL_KEYS) else {"": next(iter(tensors.values()))}


def read_tokens(paths: Iterable[str | Path]) -> list[TokenFile]:
    """Several token files, of different tokens.

    Raises:
        ValueError: two files are of one token, or as `read_token`.
    """
    files = [read_token(path) for path in paths]
    seen: dict[str, TokenFile] = {}
    for file in files:
        if file.token in seen:
            raise ValueError(f"{str(seen[file.token].path)!r} and {str(file.path)!r} both are the token {file.token}. Give one.")
        seen[file.token] = file
    return files


def _read_metadata(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        text = (file.metadata() or {}).get(_METADATA, "{}")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    return content if isinstance(content, dict) else {}
