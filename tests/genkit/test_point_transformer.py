"""PointSetTransformer and its training: sets without an order, the same by batch, saved and loaded; clouds as they are told."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from genkit import noise
from genkit.assembly.descriptors import FEATURES, part_features
from genkit.assembly.point_model import PointModel
from genkit.assembly.point_transformer import PointSetTransformer, fourier
from genkit.assembly.pointwise import PointwiseLatentDenoiser, load_luo_hu
from genkit.assembly.rigid import random_rotations, transform
from genkit.pipelines import PartAssemblyPipeline

trimesh = pytest.importorskip("trimesh")

from genkit.data.furniture import draw  # noqa: E402
from genkit.zoo.training import furniture  # noqa: E402


def tiny() -> PointSetTransformer:
    torch.manual_seed(0)
    net = PointSetTransformer(["chair", "table"], width=16, layers=2, heads=2, latents=4).eval()
    torch.nn.init.normal_(net.proj_out.weight, std=0.1)
    return net


def test_the_output_turns_over_with_the_points_and_rows_are_alone() -> None:
    net, x, t = tiny(), torch.randn(3, 20, 3), torch.tensor([10, 400, 900])
    labels, order = torch.tensor([0, 1, 2]), torch.randperm(20)
    out = net(x, t, class_labels=labels).sample
    assert torch.allclose(net(x[:, order], t, class_labels=labels).sample, out[:, order], atol=1e-5)
    assert torch.allclose(net(x[1:2], t[1:2], class_labels=labels[1:2]).sample, out[1:2], atol=1e-5)
    # It sees the set: another point elsewhere changes the first one's output.
    moved = x.clone()
    moved[:, -1] += 3
    assert (net(moved, t, class_labels=labels).sample[:, 0] - out[:, 0]).abs().max() > 1e-4
    assert torch.equal(net(x[2:], t[2:]).sample, net(x[2:], t[2:], class_labels=labels[2:]).sample)
    assert fourier(x).shape == (3, 20, 39)


def test_the_embedded_network_is_small() -> None:
    net = PointSetTransformer(list(furniture.CATEGORIES), part_features=FEATURES)
    assert 0.5e6 < sum(p.numel() for p in net.parameters()) < 1e6


def test_parts_are_told_in_any_order_and_rows_that_are_none_say_nothing() -> None:
    torch.manual_seed(0)
    net = PointSetTransformer(["chair"], width=16, layers=2, heads=2, latents=4, part_features=FEATURES).eval()
    torch.nn.init.normal_(net.proj_out.weight, std=0.1)
    x, t, parts = torch.randn(2, 20, 3), torch.tensor([10, 400]), torch.rand(2, 5, FEATURES)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    out = net(x, t, parts=parts, part_mask=mask).sample
    assert torch.allclose(net(x, t, parts=parts[:, [2, 0, 1, 3, 4]], part_mask=mask).sample, out, atol=1e-5)
    assert torch.allclose(net(x[1:], t[1:], parts=parts[1:, :3]).sample, out[1:], atol=1e-5)
    none = net(x, t, parts=parts, part_mask=torch.zeros_like(mask)).sample
    assert torch.allclose(net(x, t).sample, none, atol=1e-5)
    assert (none - out).abs().max() > 1e-3
    with pytest.raises(ValueError, match="not told of parts"):
        tiny()(x, t, parts=parts)


def test_descriptors_know_sizes_and_no_poses() -> None:
    """A cube of side 2: its area is 24, and along each axis the variance is (2 * 1 + 4 / 3) / 6 = 5/9."""
    cube = torch.from_numpy(trimesh.sample.sample_surface(trimesh.creation.box((2, 2, 2)), 20000, seed=0)[0])
    turn = random_rotations(1, torch.Generator().manual_seed(0))[0]
    points, areas = torch.stack([cube, 3 * cube @ turn.T + 5]), torch.tensor([24.0, 216.0])
    features = part_features(points, areas)
    assert features.shape == (2, FEATURES)
    assert torch.allclose(3 * features[0], features[1], rtol=1e-5)
    length = 240**0.5
    assert torch.allclose(features[0, :4] * length, torch.tensor([24, 5 / 9, 5 / 9, 5 / 9]).sqrt(), rtol=0.02)
    # Half of a face is within sqrt(2 / pi) of its middle: |x|^2 = 1 + 2 / pi.
    assert float(features[0, 6]) * length == pytest.approx((1 + 2 / torch.pi) ** 0.5, rel=0.01)


def test_clouds_are_a_function_of_seed_and_number_and_the_pipeline_is_saved(tmp_path: Path) -> None:
    pipe = PartAssemblyPipeline(tiny(), furniture.point_scheduler())
    pipe.save_pretrained(tmp_path)
    again = PartAssemblyPipeline.from_zoo(str(tmp_path))
    assert again.denoiser.config.categories == ["chair", "table"]
    model = PointModel(again.denoiser, again.scheduler)
    clouds = model.generate(3, "table", points=64, steps=3, batch_size=2)
    assert clouds.shape == (3, 64, 3)
    assert torch.allclose(PointModel(pipe.denoiser, pipe.scheduler).generate(1, 1, points=64, steps=3)[0], clouds[0], atol=1e-4)
    assert not torch.allclose(model.generate(1, "chair", points=64, steps=3)[0], clouds[0], atol=1e-3)
    with pytest.raises(ValueError, match="Unknown category"):
        model.generate(1, "lamp")


def test_a_fresh_process_loads_a_saved_pipeline(tmp_path: Path) -> None:
    PartAssemblyPipeline(tiny(), furniture.point_scheduler()).save_pretrained(tmp_path)
    code = "import sys; from genkit.pipelines import PartAssemblyPipeline as P; print(len(P.from_zoo(sys.argv[1]).denoiser.blocks))"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


def test_training_lowers_the_loss_and_saves_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = furniture.TrainConfig(steps=30, batch_size=8, lr=3e-3, warmup=5, validate_every=15, bf16=False, ema_decay=0.8)
    monkeypatch.setattr(furniture, "HELD", 2)
    monkeypatch.setattr(furniture, "SEEN", (64, 128, 256))
    furniture.train(tmp_path, shapes=2, config=config, width=16, layers=1, heads=2, latents=4)
    log = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    losses = [entry["validation"]["loss"] for entry in log if "validation" in entry]
    assert losses[-1] < losses[0] < 1.2
    assert PartAssemblyPipeline.from_zoo(str(tmp_path)).denoiser.config.width == 16


def test_clouds_are_centred_of_one_area_and_turned_a_little() -> None:
    shapes = furniture.furniture_shapes("train", 1)
    clouds = shapes.clouds[:, 0].float()
    assert clouds.mean(1).abs().max() < 0.01
    for category, cloud, parts, count in zip(furniture.CATEGORIES, clouds, shapes.parts[:, 0], shapes.counts[:, 0], strict=True):
        drawn = draw(category, 0, "train").parts()
        extent = float(cloud[:, 1].max() - cloud[:, 1].min()) / furniture.SURFACE_AREA**0.5
        true = transform(drawn.points.double(), drawn.poses)[..., 1]
        assert extent == pytest.approx(float(true.max() - true.min()) / float(drawn.areas.sum()) ** 0.5, rel=0.03)
        assert count == len(drawn)
        assert torch.allclose(parts[:count], part_features(drawn.points, drawn.areas), atol=0.02)
        assert not parts[count:].any()
    seen = furniture.augmented(clouds, torch.Generator().manual_seed(0), 2048)
    assert (seen[..., 1].std(1) / clouds[..., 1].std(1) - 1).abs().max() < furniture.JITTER + 0.02
    assert not torch.allclose(seen.norm(dim=-1).sort(1).values, clouds[:, :2048].norm(dim=-1).sort(1).values)


def pointwise() -> PointwiseLatentDenoiser:
    torch.manual_seed(1)
    return PointwiseLatentDenoiser(["chair"], latent_dim=5, flow_depth=3, flow_width=8, widths=(6, 8)).eval()


def test_the_pointwise_network_has_the_published_size_and_sees_points_alone() -> None:
    full = PointwiseLatentDenoiser()
    assert sum(p.numel() for p in full.diffusion.parameters()) == 995_608
    net, x, t = pointwise(), torch.randn(2, 7, 3), torch.tensor([0, 99])
    z = net.draw([3, 4])
    out = net(x, t, context=z).sample
    assert torch.allclose(net(x[:, :2], t, context=z).sample, out[:, :2], atol=1e-6)
    assert not torch.allclose(net(x, t, context=z.flip(0)).sample, out)
    with pytest.raises(ValueError, match="context"):
        net(x, t)


def test_latents_undo_the_flow() -> None:
    """From z back to w by the couplings' definition: y_b = x_b sigmoid(s + 2) + t."""
    net = pointwise()
    w = z = net.draw([3, 4])
    for coupling in net.flow["chain"]:
        k, n = coupling.kept, w.shape[1]
        kept, moved = (w[:, n - k :], w[:, : n - k]) if coupling.swap else (w[:, :k], w[:, k:])
        s, t = coupling.net_s_t(kept).chunk(2, 1)
        moved = moved * torch.sigmoid(s + 2) + t
        w = torch.cat([moved, kept] if coupling.swap else [kept, moved], 1)
    assert torch.allclose(w, noise.normal([3, 4], (5,)), atol=1e-5)
    assert not torch.allclose(w, z, atol=1e-2)


def test_one_step_of_ddpm_is_that_of_luo_and_hu() -> None:
    """Spec g.17: x <- (x - (1 - alpha) / sqrt(1 - abar) eps) / sqrt(alpha) + sigma z, their t = k + 1, without clipping."""
    net = pointwise()
    scheduler, x, eps, k = net.scheduler(), 3 * torch.randn(2, 7, 3), torch.randn(2, 7, 3), 40
    alpha, abar = 1 - net.betas, (1 - net.betas).cumprod(0)
    sigma = ((1 - abar[k - 1]) / (1 - abar[k]) * net.betas[k]).sqrt()
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    expected = (x - (1 - alpha[k]) / (1 - abar[k]).sqrt() * eps) / alpha[k].sqrt() + sigma * z
    step = scheduler.step(eps, k, x, generator=torch.Generator().manual_seed(0)).prev_sample
    assert torch.allclose(step, expected, atol=1e-6, rtol=1e-6)


def test_released_checkpoints_are_read_where_pickles_are_allowed(tmp_path: Path) -> None:
    torch.manual_seed(2)
    net = PointwiseLatentDenoiser(["chair"], latent_dim=4, flow_depth=2, flow_width=8).eval()
    settings = argparse.Namespace(
        model="flow", latent_dim=4, num_steps=100, beta_1=1e-4, beta_T=0.02, residual=True, latent_flow_depth=2,
        latent_flow_hidden_dim=8,
    )  # fmt: skip
    file = tmp_path / "GEN_chair.pt"
    extra = {"encoder.conv1.weight": torch.zeros(2), "diffusion.var_sched.betas": torch.zeros(101)}
    torch.save({"args": settings, "state_dict": {**net.state_dict(), **extra}}, file)
    with pytest.raises(ValueError, match="--allow-pickle"):
        load_luo_hu(file, ["chair"])
    again = load_luo_hu(file, ["chair"], allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True))
    assert PointModel(again, again.scheduler()).generate(2, "chair", points=9, steps=3).shape == (2, 9, 3)
    # Sizes are the file's word: neither of these takes the memory that it speaks of.
    weights = net.state_dict()
    wide = argparse.Namespace(**vars(settings) | {"latent_flow_hidden_dim": 10**7})
    one = {key: torch.zeros(()).expand(value.shape) for key, value in weights.items()}
    for args, content in ((settings, {**weights, "flow.chain.0.net_s_t.0.bias": torch.zeros(3)}), (wide, weights), (settings, one)):
        torch.save({"args": args, "state_dict": content}, file)
        with pytest.raises(ValueError, match="lacks"):
            load_luo_hu(file, ["chair"], allow_pickle=True)
    torch.save({"args": settings, "state_dict": {}}, file)
    with pytest.raises(ValueError, match="0 weights of 2 couplings"):
        load_luo_hu(file, ["chair"], allow_pickle=True)
    torch.save({"args": Path("x")}, file)
    with pytest.raises(ValueError, match="no generator"):
        load_luo_hu(file, ["chair"], allow_pickle=True)
