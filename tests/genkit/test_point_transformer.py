"""PointSetTransformer and its training: sets without an order, the same by batch, saved and loaded; clouds as they are told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genkit.assembly.point_model import PointModel
from genkit.assembly.point_transformer import PointSetTransformer, fourier
from genkit.pipelines import PartAssemblyPipeline

pytest.importorskip("trimesh")

from genkit.zoo.training import furniture


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


def test_the_default_network_is_small() -> None:
    assert 0.5e6 < sum(p.numel() for p in PointSetTransformer(list(furniture.CATEGORIES)).parameters()) < 1e6


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


def test_training_lowers_the_loss_and_saves_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = furniture.TrainConfig(steps=30, batch_size=8, lr=3e-3, warmup=5, validate_every=15, bf16=False, ema_decay=0.8)
    monkeypatch.setattr(furniture, "HELD", 2)
    furniture.train(tmp_path, shapes=2, config=config, width=16, layers=1, heads=2, latents=4)
    log = [json.loads(line) for line in (tmp_path / "training" / "log.jsonl").read_text().splitlines()]
    losses = [entry["validation"]["loss"] for entry in log if "validation" in entry]
    assert losses[-1] < losses[0] < 1.2
    assert PartAssemblyPipeline.from_zoo(str(tmp_path)).denoiser.config.width == 16


def test_clouds_are_centred_scaled_and_turned_a_little() -> None:
    clouds = furniture.furniture_clouds("train", 1)[:, 0].float()
    assert clouds.mean(1).abs().max() < 0.01
    assert clouds.std((1, 2)) == pytest.approx(1, abs=0.01)
    seen = furniture.augmented(clouds, torch.Generator().manual_seed(0), 2048)
    assert (seen[..., 1].std(1) / clouds[..., 1].std(1) - 1).abs().max() < furniture.JITTER + 0.01
    assert not torch.allclose(seen.norm(dim=-1).sort(1).values, clouds.norm(dim=-1).sort(1).values)
