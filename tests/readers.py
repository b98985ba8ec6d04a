"""Every reader of genkit, with valid inputs to damage: `READERS[name]()` is a `tests.fuzz.Reader`."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz import Reader

READERS: dict[str, Callable[[], Reader]] = {}


def _reader(name: str) -> Callable[[Callable[[], Reader]], Callable[[], Reader]]:
    def add(make: Callable[[], Reader]) -> Callable[[], Reader]:
        READERS[name] = cache(make)
        return make

    return add


def _json(*documents: Any) -> tuple[bytes, ...]:
    return tuple(json.dumps(document).encode() for document in documents)


def _written(name: str, write: Callable[[Path], object]) -> bytes:
    """What a function writes to a file of this name."""
    with tempfile.TemporaryDirectory() as scratch:
        write(Path(scratch) / name)
        return (Path(scratch) / name).read_bytes()


# Recipes and pictures


@cache
def _recipes() -> tuple[str, ...]:
    from genkit.recipe import Recipe, versions

    recipes = [
        Recipe(prompt="a red seven on a yellow background", negative="bad", seed=3, sampler="ddim", eta=0.5, width=32, height=32),
        Recipe(prompt="a <seven>", guidance=("classifier:label=seven,scale=2",), tokens=("<seven>:0123456789ab",)),
        Recipe(label=7, cfg=1),
    ]
    return tuple(recipe.to_json(versions()) for recipe in recipes)


@_reader("recipe")
def _recipe() -> Reader:
    from genkit.recipe import Recipe

    def read(path: Path) -> None:
        recipe = Recipe.from_json(path.read_bytes().decode("utf-8", "surrogateescape"))
        assert len(recipe.name) < 100
        assert len(recipe.hash) == 12
        recipe.parameters((32, 32), {"genkit": "0"}).encode()
        recipe.require_trusted(tokens=["<seven>:0123456789ab"])

    return Reader(read=read, valid=tuple(text.encode() for text in _recipes()), name="recipe.json", form="json")


@_reader("PNG")
def _png() -> Reader:
    from PIL import Image

    from genkit.images import save_png
    from genkit.recipe import CHUNK, read_recipe

    picture = Image.new("RGB", (4, 4), "red")
    valid = tuple(_written("a.png", lambda path, text=text: save_png(picture, path, {CHUNK: text})) for text in _recipes())
    return Reader(read=read_recipe, valid=valid, name="a.png")


@_reader("PNG chunks")
def _png_chunks() -> Reader:
    from genkit.recipe import read_recipe

    def png(chunk: bytes) -> bytes:
        """A picture with this text chunk (its kind first) and right checksums, so that what is in it is read."""
        pixels = zlib.compress(b"\x00\x00\x00\x00")
        parts = (b"IHDR" + struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0), chunk.ljust(4), b"IDAT" + pixels, b"IEND")
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(part) - 4) + part + struct.pack(">I", zlib.crc32(part)) for part in parts
        )

    texts = [text.encode() for text in _recipes()]
    valid = [b"tEXtgenkit\0" + text for text in texts] + [b"zTXtgenkit\0\0" + zlib.compress(text) for text in texts]
    valid += [b"iTXtgenkit\0\0\0\0\0" + text for text in texts] + [b"iTXtgenkit\0\1\0\0\0" + zlib.compress(text) for text in texts]
    return Reader(read=read_recipe, valid=tuple(valid), name="a.png", wrap=png)


def _pictures(*kinds: str) -> tuple[bytes, ...]:
    from PIL import Image

    rng = np.random.default_rng(0)
    colours, grey = rng.integers(0, 256, (24, 16, 3), dtype=np.uint8), rng.integers(0, 65536, (8, 8), dtype=np.uint16)
    found = []
    for kind in kinds:
        for image in (Image.fromarray(colours), Image.fromarray(colours).convert("P"), Image.fromarray(grey)):
            try:
                found.append(_written(f"a.{kind}", image.save))
            except OSError:  # the format has no such pixels
                continue
    if "gif" in kinds:
        frames = [Image.new("P", (8, 8), i) for i in range(3)]
        found.append(_written("a.gif", lambda path: frames[0].save(path, save_all=True, append_images=frames[1:])))
    return tuple(found)


@_reader("pictures")
def _read_picture() -> Reader:
    from genkit.data.pictures import fit_picture, picture_size, read_picture

    def read(path: Path) -> None:
        image, _ = read_picture(path)
        assert picture_size(path) == (image.height, image.width)
        assert fit_picture(image, (16, 16)).shape == (3, 16, 16)

    return Reader(read=read, valid=_pictures("png", "jpg", "webp", "bmp", "tif", "gif"), name="a.picture")


@_reader("pictures (npz)")
def _picture_arrays() -> Reader:
    """A member is damaged and the archive's checksums are right; the first byte says which."""
    from genkit.data.arrays import open_arrays

    rng = np.random.default_rng(0)
    arrays = {"arr_0": rng.integers(0, 256, (3, 8, 8, 3), dtype=np.uint8), "labels": np.array([1, 2, 3])}
    members = {f"{name}.npy": _npy(array) for name, array in arrays.items()}

    def wrap(content: bytes) -> bytes:
        return _zipped(members | {list(members)[(content or b"\0")[0] % 2]: content[1:]})

    valid = tuple(bytes([i]) + content for i, content in enumerate(members.values()))
    return Reader(read=lambda path: open_arrays(path).images([0], (8, 8)), valid=valid, name="samples.npz", wrap=wrap)


@_reader("label maps")
def _label_map() -> Reader:
    from PIL import Image

    from genkit.data.pictures import fit_mask

    values = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    valid = tuple(_written("a.png", image.save) for image in (values, values.convert("P"), values.convert("1")))
    return Reader(read=lambda path: fit_mask(path, (16, 16)), valid=valid, name="a.png")


# Lists of labels, prompts and captions; what is typed


@_reader("label files")
def _label_file() -> Reader:
    from genkit.cli.common import read_prompts
    from genkit.pipelines.classes import check_labels, fill_template

    def read(path: Path) -> None:
        fill_template(check_labels(read_prompts(None, path, what="label")), ["a photo of a {}"])

    valid = (b"cat\ndog\n# no label\n\nblue bird\n", "\ufeffchat\r\nété\r\n".encode())
    return Reader(read=read, valid=valid, name="labels.txt", form="text")


@_reader("prompt files")
def _prompt_file() -> Reader:
    from genkit.cli.synth import read_texts

    valid = (b"a red seven\n# comment\na blue two on paper\n", b"\xef\xbb\xbfun chat\r\n")
    return Reader(read=lambda path: read_texts(path, [], None, None), valid=valid, name="prompts.txt", form="text")


@_reader("prompt tables")
def _prompt_table() -> Reader:
    from genkit.cli.synth import read_texts

    valid = (b'{"text": "a red seven"}\n{"text": "a blue two", "id": 3}\n',)
    return Reader(read=lambda path: read_texts(path, [], None, None), valid=valid, name="prompts.jsonl", form="jsonl")


@_reader("captions")
def _captions() -> Reader:
    from genkit.data.source import open_source

    picture = _pictures("png")[0]
    valid = (b'{"file_name": "a.png", "text": "a red seven"}\n{"file_name": "b.png", "text": "a cat"}\n',)
    return Reader(
        read=lambda path: open_source(path.parent), valid=valid, name="metadata.jsonl", form="jsonl",
        beside={"a.png": picture, "b.png": picture},
    )  # fmt: skip


@_reader("label hierarchies")
def _hierarchy() -> Reader:
    from genkit.cli.classify import _hierarchy as read

    return Reader(read=read, valid=_json({"an animal": ["cat", "dog"], "a plant": ["rose"]}), name="tree.json", form="json")


@_reader("options")
def _options() -> Reader:
    """What is typed: seeds, sizes, labels, sweeps, guidance, names of tokens, probabilities, devices."""
    from genkit.cli.classify import _prior
    from genkit.cli.common import check_device, check_dtype, positive_numbers
    from genkit.cli.synth import parse_labels
    from genkit.guidance import registry
    from genkit.recipe import Recipe
    from genkit.sweep import Axis, parse_seeds, parse_size, plan
    from genkit.tokens import token_of

    recipe = Recipe(prompt="a", guidance=("classifier:label=seven,scale=2",))

    def sweep(text: str) -> None:
        plan([recipe], [0], [Axis.parse(text)])

    parsers: tuple[Callable[[str], Any], ...] = (
        parse_seeds, parse_size, parse_labels, sweep, registry.split, token_of, _prior, check_device, check_dtype,
        lambda text: positive_numbers("--steps", text, "10,30"),
    )  # fmt: skip

    def read(path: Path) -> None:
        text = path.read_bytes().decode("utf-8", "surrogateescape")[:2000]
        refused = 0
        for parse in parsers:
            try:
                parse(text)
            except ValueError:
                refused += 1
        if refused == len(parsers):
            raise ValueError("none of them takes it")

    valid = (
        b"0-15", b"1,2,5-10", b"64x48", b"seven,three", b"207,360", b"cfg=1,3,5", b"classifier.scale=0,1,2", b'negative="a,b",c',
        b"classifier:label=seven,scale=2,start=0.2", b'clip:text="a, b",scale=5', b"mymodule:function:scale=2", b"cat=0.9,dog=0.1",
        b"cuda:0", b"float16", b"10,30",
    )  # fmt: skip
    return Reader(read=read, valid=valid, name="option.txt", form="text")


# Layouts


@_reader("COCO")
def _coco() -> Reader:
    from genkit.data.coco import read_coco

    images = [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(3)]
    categories = [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]
    annotations = [
        {"id": i, "image_id": i % 3, "category_id": (3, 7)[i % 2], "bbox": [1 + i, 2, 20.5, 30], "area": 615, "iscrowd": i // 4}
        for i in range(5)
    ]
    valid = _json({"images": images, "annotations": annotations, "categories": categories, "info": {}})
    return Reader(read=read_coco, valid=valid, name="instances.json", form="json")


@_reader("layouts")
def _layouts() -> Reader:
    from genkit.layouts import Layout, pack, unpack

    def read(path: Path) -> None:
        try:
            content = json.loads(path.read_bytes())
        except RecursionError as error:
            raise ValueError("no layout") from error
        if not isinstance(content, dict) or not {"labels", "boxes"} <= set(content):
            raise ValueError("no layout")
        layout = Layout(content["labels"], content["boxes"])
        found = unpack(pack([layout], ["one", "two", "seven"], 6), ["one", "two", "seven"])[0]
        assert len(found.labels) == len(layout.labels)

    valid = _json(
        {"labels": ["seven", "two"], "boxes": [[0.1, 0.1, 0.4, 0.5], [0.5, 0.5, 0.9, 0.9]]},
        {"labels": [0, 2, 1], "boxes": [[0, 0, 1, 1], [0.25, 0, 0.5, 1], [0.0, 0.5, 0.5, 1.0]]},
    )
    return Reader(read=read, valid=valid, name="layout.json", form="json")


@_reader("layout tokens")
def _layout_tokens() -> Reader:
    """Rows of the table of "tokens", as a search may end up with: a layout, or an error for what is none."""
    import torch

    from genkit.denoisers import Denoiser
    from genkit.inversion import LayoutSlots
    from tests.genkit.test_layouts import tiny

    slots = LayoutSlots(Denoiser.of(tiny("tokens")))

    def read(path: Path) -> None:
        content = path.read_bytes()
        rows = torch.from_numpy(np.frombuffer(content[: len(content) // 4 * 4], dtype="<i4").astype(np.int64))
        slots.layout(rows)

    legal = [torch.nonzero(allowed)[:, 0] for allowed in slots.allowed]
    g = torch.Generator().manual_seed(0)
    choices = [[int(rows[torch.randint(len(rows), (1,), generator=g)]) for rows in legal] for _ in range(8)]
    return Reader(read=read, valid=tuple(np.array(rows, dtype="<i4").tobytes() for rows in choices), name="tokens")


# Parts, meshes and clouds


@cache
def _fields() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    quaternions = rng.normal(size=(3, 4))
    poses = np.concatenate([rng.normal(size=(3, 3)), quaternions / np.linalg.norm(quaternions, axis=1, keepdims=True)], 1)
    return {
        "part_pcs": rng.normal(size=(3, 20, 3)).astype(np.float32), "part_poses": poses, "part_ids": np.array([1, 2, 2]),
        "geo_part_ids": np.array([0, 1, 1]), "sym": np.zeros((3, 3), bool),
        "contacts": np.zeros((3, 3, 4), np.float32), "names": np.array(["seat", "leg", "arm"]),
    }  # fmt: skip


def _npy(array: Any, *, allow_pickle: bool = False) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=allow_pickle)
    return buffer.getvalue()


def _zipped(members: dict[str, bytes], *, compressed: bool = False) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@_reader("part arrays (npz)")
def _npz() -> Reader:
    from genkit.data.meshes import read_parts

    members = {f"{name}.npy": _npy(array) for name, array in _fields().items()}
    cloud = {"part_pcs.npy": members["part_pcs.npy"]}
    valid = (_zipped(members), _zipped(members, compressed=True), _zipped(cloud))
    return Reader(read=lambda path: read_parts(path), valid=valid, name="parts.npz")


@_reader("part arrays (members)")
def _npz_members() -> Reader:
    """One member is damaged and the archive's checksums are right; the first byte says which."""
    from genkit.data.meshes import read_parts

    members = {f"{name}.npy": _npy(array) for name, array in _fields().items()}
    names = list(members)

    def wrap(content: bytes) -> bytes:
        return _zipped(members | {names[(content or b"\0")[0] % len(names)]: content[1:]})

    valid = tuple(bytes([i]) + members[name] for i, name in enumerate(names))
    return Reader(read=lambda path: read_parts(path), valid=valid, name="parts.npz", wrap=wrap)


@_reader("clouds (npy)")
def _cloud() -> Reader:
    from genkit.data.meshes import read_reference

    valid = (_npy(_fields()["part_pcs"][0]), _npy(_fields()["part_pcs"][0].astype(">f8")))
    return Reader(read=read_reference, valid=valid, name="cloud.npy")


@_reader("PartNet (pickled npy)")
def _partnet() -> Reader:
    from genkit.data.meshes import read_parts

    fields = dict(_fields())
    fields.pop("names")
    valid = (_npy(np.array(fields, dtype=object), allow_pickle=True),)
    return Reader(read=lambda path: read_parts(path, allow_pickle=True), valid=valid, name="1_level3.npy")


def _mesh_reader(kind: str) -> Reader:
    import logging

    import trimesh

    from genkit.data.meshes import read_mesh, read_parts

    logging.getLogger("trimesh").disabled = True
    box, ball = trimesh.creation.box((1, 2, 3)), trimesh.creation.icosphere(1)
    if kind == "glb":
        scene = trimesh.Scene({"box": box, "ball": ball})
        return Reader(read=lambda path: read_parts(path), valid=(_bytes(scene.export(file_type="glb")),), name="a.glb")
    if kind == "gltf":
        # All in one file, as a stranger would send it.
        files = trimesh.Scene({"box": box, "ball": ball}).export(file_type="gltf")
        beside = {name: content for name, content in files.items() if name != "model.gltf"}
        return Reader(
            read=lambda path: read_parts(path), valid=(files["model.gltf"],), name="model.gltf", form="json", beside=beside
        )
    valid = [_bytes(mesh.export(file_type=kind)) for mesh in (box, ball)]
    if kind in ("ply", "stl"):
        valid += [_bytes(mesh.export(file_type="stl_ascii")) for mesh in (box, ball)] if kind == "stl" else [
            _bytes(mesh.export(file_type="ply", encoding="ascii")) for mesh in (box, ball)
        ]  # fmt: skip
    return Reader(read=read_mesh, valid=tuple(valid), name=f"a.{kind}")


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


for _kind in ("obj", "ply", "stl", "off", "glb", "gltf"):
    READERS[f"meshes ({_kind})"] = cache(lambda kind=_kind: _mesh_reader(kind))


@_reader("Luo-Hu checkpoints")
def _luo_hu() -> Reader:
    import torch

    from genkit.assembly.pointwise import PointwiseLatentDenoiser, load_luo_hu

    sizes = {"latent_dim": 4, "num_steps": 5, "beta_1": 1e-4, "beta_T": 0.02, "residual": True}
    net = PointwiseLatentDenoiser(["chair"], **sizes, flow_depth=2, flow_width=8)
    settings = argparse.Namespace(**sizes, latent_flow_depth=2, latent_flow_hidden_dim=8)
    buffer = io.BytesIO()
    torch.save({"args": settings, "state_dict": net.state_dict()}, buffer)
    return Reader(read=lambda path: load_luo_hu(path, ["chair"], allow_pickle=True), valid=(buffer.getvalue(),), name="GEN.pt")


# Journals, caches, runs and models


@_reader("journals")
def _journal() -> Reader:
    from genkit.journal import Journal

    lines = ({"settings": {"model": "digits", "pairs": 64}}, {"image": "a.png", "label": "seven"}, {"image": "b.png"})
    valid = b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def read(path: Path) -> None:
        journal = Journal(path, {"model": "digits", "pairs": 64})
        assert all(isinstance(record, dict) for record in journal.records())

    return Reader(read=read, valid=(valid, valid[:-10]), name="results.jsonl", form="bytes")


@_reader("journal lines")
def _journal_lines() -> Reader:
    whole = _journal()
    return dataclasses.replace(whole, valid=whole.valid[:1], form="jsonl")


@_reader("feature caches")
def _features() -> Reader:
    from genkit.features.cache import FeatureCache

    settings = {
        "model": "tiny:0123456789ab", "data": {"name": "digits", "rows": 70, "fingerprint": "0123456789ab"},
        "taps": {"mid": [4, 2, 2]}, "t": 100, "noise": "fixed", "seed": 0, "pool": 2, "dtype": "float16", "size": [32, 32],
    }  # fmt: skip
    names = [f"{i}.png" for i in range(70)]

    def read(path: Path) -> None:
        cache = FeatureCache(path.parent)
        assert set(cache.features([0, 1, 69])) == set(cache.record["taps"])

    return Reader(
        read=read, valid=_json({"settings": settings, "names": names, "labels": None, "groups": list(range(70))}),
        name="features.json", form="json",
        beside={"done-0.json": b"[0, 64]", "mid.npy": _npy(np.zeros((70, 1, 4, 2, 2), np.float16))},
    )  # fmt: skip


@_reader("feature notes")
def _feature_notes() -> Reader:
    whole = _features()
    beside = {**whole.beside, "features.json": whole.valid[0]}
    beside.pop("done-0.json")
    return dataclasses.replace(whole, name="done-0.json", valid=(b"[0, 64]",), beside=beside)


@_reader("feature arrays")
def _feature_arrays() -> Reader:
    whole = _features()
    beside = {**whole.beside, "features.json": whole.valid[0]}
    return dataclasses.replace(whole, name="mid.npy", valid=(beside.pop("mid.npy"),), beside=beside, form="bytes")


@_reader("probes")
def _probe() -> Reader:
    from genkit.denoisers import Denoiser
    from genkit.features.heads import LinearHead
    from genkit.features.probe import Probe, ProbeConfig, extractor_of
    from tests import tiny

    denoiser = Denoiser.of(tiny.pipeline("stable_diffusion"))
    config = ProbeConfig(taps=("mid",), t=(100,), head="linear", pool=1)
    head = LinearHead({"mid": (extractor_of(denoiser, config).info(16, 16)[0].shape[0], 1, 1)}, 2, pool=1)
    with tempfile.TemporaryDirectory() as scratch:
        Probe(head, denoiser, config, ["a", "b"]).save(scratch)
        files = {path.name: path.read_bytes() for path in Path(scratch).iterdir()}
    return Reader(
        read=lambda path: Probe.load(path.parent, denoiser), valid=(files.pop("probe.json"),), name="probe.json", form="json",
        beside=files,
    )  # fmt: skip


@_reader("recipes of distillations (TOML)")
def _distill_recipe() -> Reader:
    from genkit.distill.config import DistillConfig, recipe_teacher
    from genkit.distill.synth import SynthConfig

    def read(path: Path) -> None:
        recipe_teacher(path)
        SynthConfig.preset(path)
        DistillConfig.preset("ladd", synthetic=True, side=64, recipe=path)

    files = (Path(__file__).parent.parent / "recipes").glob("*-ladd.toml")
    return Reader(read=read, valid=tuple(sorted(file.read_bytes() for file in files)), name="recipe.toml", form="toml")


@_reader("few-step specs")
def _few_step() -> Reader:
    from genkit.distill.spec import FewStepSpec

    spec = FewStepSpec(method="ladd", levels=(1.0, 0.75, 0.5, 0.25), teacher="digits", height=32, width=32)
    valid = _written("genkit_distill.json", lambda path: spec.save(path.parent))
    return Reader(read=lambda path: FewStepSpec.load(path.parent), valid=(valid,), name="genkit_distill.json", form="json")


@_reader("runs")
def _run() -> Reader:
    from genkit.distill.config import DistillConfig
    from genkit.distill.runs import require_same_run
    from genkit.distill.trained import TrainedRun

    config = DistillConfig(teacher="digits").to_json()

    def read(path: Path) -> None:
        TrainedRun(path.parent).spec()
        require_same_run(path.parent, config, resume=True)

    return Reader(read=read, valid=_json(config), name="config.json", form="json")


@_reader("shards")
def _shard() -> Reader:
    from genkit.distill.shards import Shard, identity

    def read(path: Path) -> None:
        shard = Shard(path, identity({}))
        shard.read("latents", list(range(len(shard))))

    return Reader(read=read, valid=(_shard_bytes(),), name="shard-00000.safetensors")


def _shard_bytes() -> bytes:
    import torch
    from safetensors.torch import save

    from genkit.distill.shards import identity

    metadata = {"prompts": ["a", "b"], "settings": identity({}), "rows": identity([0, 1]), "paired": True, "skipped": []}
    tensors = {"latents": torch.zeros(2, 4, 2, 2), "seed": torch.arange(2)}
    return save(tensors, {key: json.dumps(value) for key, value in metadata.items()})


@_reader("records of latents")
def _latents() -> Reader:
    from genkit.distill.data import LatentDataset
    from genkit.distill.shards import identity, settings_of

    record = {
        "format": 1, "kind": "synth", "space": {"factor": 4, "scaling_factor": 0.18}, "steps": 50, "storage": "float32",
        "shards": [{"items": 2, "shape": [4, 2, 2]}],
    }  # fmt: skip
    shard = _shard_bytes().replace(identity({}).encode(), identity(settings_of(record)).encode())
    return Reader(
        read=lambda path: LatentDataset(path.parent).latents([0, 1]), valid=_json(record), name="synth.json", form="json",
        beside={"shard-00000.safetensors": shard},
    )  # fmt: skip


@_reader("token files")
def _token() -> Reader:
    import torch

    from genkit.tokens import load_vectors, read_token, write_token

    vectors = ({"": torch.randn(2, 8)}, {"clip_l": torch.randn(1, 8), "clip_g": torch.randn(1, 16)})
    valid = [_written("seven.safetensors", lambda path, v=v: write_token(path, "<seven>", v, {"model": "digits"})) for v in vectors]
    return Reader(read=lambda path: load_vectors(read_token(path)), valid=tuple(valid), name="seven.safetensors")


@cache
def _model() -> dict[str, bytes]:
    from tests import tiny

    with tempfile.TemporaryDirectory() as scratch:
        tiny.pipeline("ddpm").save_pretrained(scratch)
        return {str(p.relative_to(scratch)): p.read_bytes() for p in Path(scratch).rglob("*") if p.is_file()}


@_reader("model indexes")
def _model_index() -> Reader:
    from genkit.cli.common import check_model

    files = dict(_model())
    return Reader(
        read=lambda path: check_model(str(path.parent), False), valid=(files.pop("model_index.json"),), name="model_index.json",
        form="json", beside=files,
    )  # fmt: skip


@_reader("model configurations")
def _model_config() -> Reader:
    """With the comparison of shapes, which builds the network of the configuration on the meta device."""
    from genkit.checkpoints import check_folder

    files = dict(_model())
    return Reader(
        read=lambda path: check_folder(path.parent.parent), valid=(files.pop("unet/config.json"),), name="unet/config.json",
        form="json", beside=files,
    )  # fmt: skip


@_reader("weights (safetensors)")
def _weights() -> Reader:
    from genkit.checkpoints import check_folder

    files = dict(_model())
    name = "unet/diffusion_pytorch_model.safetensors"
    return Reader(
        read=lambda path: check_folder(path.parent.parent, shapes=False), valid=(files.pop(name),), name=name, beside=files
    )


@_reader("cards")
def _card() -> Reader:
    from genkit import zoo
    from genkit.cli.classify import _class_prompts

    def read(path: Path) -> None:
        zoo.card(str(path.parent))
        _class_prompts(str(path.parent))

    valid = _json({"what": "digits", "class_prompts": {"seven": "a seven"}, "quality": {"digit": 0.9}, "training": {"steps": 10}})
    return Reader(read=read, valid=valid, name="card.json", form="json")


@_reader("figures of exports")
def _figures() -> Reader:
    from genkit.cli.export import _read_figures

    return Reader(
        read=_read_figures, valid=_json({"Frechet distance, 1 step": 40.1, "note": "a"}), name="figures.json", form="json"
    )


@_reader("rows of assemble-eval")
def _rows() -> Reader:
    from genkit.cli.assemble_eval import _kept

    valid = _json({"settings": {"seed": 0, "protocol": "strict"}, "rows": [{"name": "a", "part_accuracy": 1.0}]})
    return Reader(
        read=lambda path: _kept(path, {"seed": 0, "protocol": "strict"}, True), valid=valid, name="rows.json", form="json"
    )


@_reader("side-cars")
def _sidecar() -> Reader:
    """Never an error: what is damaged is made again."""
    from genkit.gallery import Gallery
    from genkit.recipe import Recipe

    recipe = Recipe(prompt="a red seven")

    def read(path: Path) -> None:
        Gallery(path.parent).has(recipe)

    valid = _json({"recipe": recipe.to_dict(), "hash": recipe.hash, "size": [32, 32], "seconds": 0.1})
    return Reader(read=read, valid=valid, name=f"{recipe.name}.json", form="json", beside={f"{recipe.name}.png": b""}, errors=())


@_reader("checkpoints of training (pt)")
def _checkpoint() -> Reader:
    import torch

    from genkit.training import TrainConfig, _Run

    config = TrainConfig(steps=2, batch_size=1, lr=1e-3, bf16=False)

    def made(folder: Path) -> Any:
        return _Run(torch.nn.Linear(2, 1), config, folder, "tiny", "cpu", None)  # type: ignore[arg-type]

    def write(path: Path) -> None:
        from genkit.ranks import Ranks

        run = made(path.parent)
        run.ranks = Ranks()
        run.save()

    return Reader(read=lambda path: made(path.parent).restore(), valid=(_written("checkpoint.pt", write),), name="checkpoint.pt")
