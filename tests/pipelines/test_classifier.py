"""Contract of DiffusionClassifierPipeline on every family, at tiny random configurations of the real diffusers classes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from genkit.data.pictures import fit_picture
from genkit.inversion import Descent, Leaps, Stop
from genkit.pipelines import DiffusionClassifierPipeline, GuidedPipeline
from genkit.scoring import Dive, Exhaustive, FixedRounds, PairPlan, Race, Scorer, fit_temperature, posterior
from tests import tiny

UNCONDITIONAL = ("ddpm", "ddim")
PLAN = PairPlan(count=4)
DIVE = Dive(proposer=Leaps(pairs=2, first=2, patience=2), shortlist=2)
DESCENT = Dive(proposer=Descent(batch=4, stop=Stop(loops=2)), inner=Exhaustive(), shortlist=2)
FIELDS = ["labels", "scores", "probabilities", "error_bounds", "evaluations", "verdicts"]


def inputs(family: str) -> dict:
    if family == "dit":
        return {"labels": [0, 7, 3]}
    # Flux has no size of its own, and PixArt-alpha's size is what makes it that network.
    size = {"height": 16, "width": 16} if family in ("flux", "pixart_alpha") else {}
    return {"labels": ["seven", "cat", "three"], "template": "a red {}"} | size


def pictures(count: int, size: int = 20) -> list[Image.Image]:
    rng = np.random.default_rng(3)
    return [Image.fromarray(rng.integers(0, 255, (size, size + 4, 3), dtype=np.uint8)) for _ in range(count)]


@pytest.fixture(params=[name for name in tiny.FAMILIES if name not in UNCONDITIONAL], scope="module")
def family(request):
    return request.param


@pytest.fixture(scope="module")
def pipe(family):
    return DiffusionClassifierPipeline.from_pipe(tiny.pipeline(family))


def run(pipe, family, count=2, **arguments):
    return pipe(**{"images": pictures(count), "plan": PLAN, "policy": "exhaustive", **inputs(family), **arguments})


def assert_same_scores(a: dict[str, float], b: dict[str, float]) -> None:
    assert set(a) == set(b)
    for label, score in a.items():
        assert score == pytest.approx(b[label], rel=1e-4)


def test_outputs(pipe, family):
    out = run(pipe, family)
    names = [str(label) for label in inputs(family)["labels"]]
    assert list(out.keys()) == FIELDS
    assert all(len(column) == 2 for column in out.to_tuple())
    for label, scores, probabilities in zip(out.labels, out.scores, out.probabilities, strict=True):
        assert list(scores) == names
        assert label == min(scores, key=scores.get) == max(probabilities, key=probabilities.get)
        assert sum(probabilities.values()) == pytest.approx(1)
    assert out.evaluations == [12, 12]
    assert out.error_bounds == [0, 0]
    labels, *_ = run(pipe, family, return_dict=False)
    assert labels == out.labels


def test_scores_are_those_of_the_scorer(pipe, family):
    out = run(pipe, family, count=1)
    arguments = inputs(family)
    shape = pipe.denoiser.latent_shape(arguments.get("height"), arguments.get("width"))
    side = shape[1] * pipe.denoiser.factor
    image = pictures(1)[0].resize((side * 24 // 20, side), Image.Resampling.BICUBIC)
    left = round((image.width - side) / 2)
    tensor = torch.from_numpy(np.asarray(image.crop((left, 0, left + side, side))).copy()).permute(2, 0, 1)[None] / 127.5 - 1
    if family == "dit":
        cond = pipe.denoiser.condition(labels=arguments["labels"])
    else:
        cond = pipe.denoiser.condition(prompts=["a red seven", "a red cat", "a red three"])
    with torch.no_grad():
        table = Scorer(pipe.denoiser, PLAN).table(pipe.denoiser.encode(tensor), cond)
    np.testing.assert_allclose(list(out.scores[0].values()), table.mean(2)[0].numpy(), rtol=2e-2)


def test_an_image_gets_the_same_scores_alone_and_in_any_batch(pipe, family):
    together = run(pipe, family, count=3)
    images = pictures(3)
    for batch_size in (1, 5):
        alone = run(pipe, family, images=images[2], batch_size=batch_size)
        assert alone.labels == together.labels[2:]
        assert_same_scores(alone.scores[0], together.scores[2])


def test_folding_changes_no_result(pipe, family):
    for folded, plain in zip(run(pipe, family).scores, run(pipe, family, fold=False).scores, strict=True):
        assert folded == pytest.approx(plain, rel=1e-5)


def test_the_order_of_labels_does_not_matter(pipe, family):
    arguments = inputs(family)
    turned = arguments | {"labels": arguments["labels"][::-1]}
    for policy in ("exhaustive", "race"):
        a, b = (run(pipe, family, policy=policy, plan=PairPlan(count=12), **given) for given in (arguments, turned))
        assert a.labels == b.labels
        assert a.evaluations == b.evaluations
        assert_same_scores(a.scores[1], b.scores[1])


def test_policies(pipe, family):
    whole = run(pipe, family, plan=PairPlan(count=12))
    named, rounds = ("race", "rounds", "taylor", "dive"), FixedRounds(to_keep=(2, 1), n_samples=(2, 12))
    for policy in (*named, DIVE, DESCENT, Race(floor=4), rounds, Exhaustive()):
        out = run(pipe, family, plan=PairPlan(count=12), policy=policy)
        for evaluations, verdict in zip(out.evaluations, out.verdicts, strict=True):
            # A gradient costs twice a loss.
            assert 3 <= evaluations <= 36 * (3 if isinstance(policy, Dive) else 1)
            assert verdict.evaluations == evaluations
        if isinstance(policy, Exhaustive):
            assert out.labels == whole.labels


def test_from_pipe_and_files(pipe, family, tmp_path):
    assert DiffusionClassifierPipeline.from_pipe(GuidedPipeline.from_pipe(pipe)).host is pipe.host
    pipe.save_pretrained(tmp_path / family)
    again = DiffusionClassifierPipeline.from_pretrained(tmp_path / family)
    again.set_progress_bar_config(disable=True)
    assert_same_scores(run(again, family).scores[0], run(pipe, family).scores[0])


def test_the_host_is_left_as_it_was(pipe, family):
    network = pipe.denoiser.network
    network.train()
    scheduler, grads = pipe.scheduler, [p.requires_grad for p in network.parameters()]
    config = dict(pipe.scheduler.config)

    def fail(*_):
        assert not any(module.training for module in network.modules())
        raise RuntimeError("stop")

    try:
        with pytest.raises(RuntimeError, match="stop"):
            run(pipe, family, callback=fail)
        assert all(module.training for module in network.modules())
    finally:
        network.eval()
    assert pipe.scheduler is scheduler
    assert dict(pipe.scheduler.config) == config
    assert [p.requires_grad for p in network.parameters()] == grads


def test_bfloat16(family):
    pipe = DiffusionClassifierPipeline.from_pipe(tiny.pipeline(family).to(torch.bfloat16))
    out = run(pipe, family)
    assert np.isfinite([list(scores.values()) for scores in out.scores]).all()


@pytest.mark.parametrize("family", UNCONDITIONAL)
def test_unconditional_models_cannot_classify(family):
    pipe = DiffusionClassifierPipeline.from_pipe(tiny.pipeline(family))
    with pytest.raises(ValueError, match="This UNet2D model is unconditional, so every class would have the same loss"):
        pipe(pictures(1), labels=[0, 1])


def test_a_class_conditional_pixel_model_in_grey():
    pipe = DiffusionClassifierPipeline.from_pipe(tiny.pipeline("ddpm", num_class_embeds=3, in_channels=1, out_channels=1))
    out = pipe(pictures(1), labels=[0, 2], plan=PLAN)
    assert list(out.scores[0]) == ["0", "2"]
    assert out.scores[0]["0"] != out.scores[0]["2"]
    with pytest.raises(ValueError, match="pmi compares with the null condition, which this model does not have"):
        pipe(pictures(1), labels=[0, 2], pmi=True)
    assert "2" in pipe(pictures(1), labels=[0, 2], pmi=True, null_label=1).scores[0]


# One family is enough for what does not depend on it.


@pytest.fixture(scope="module")
def sd():
    return DiffusionClassifierPipeline.from_pipe(tiny.pipeline("stable_diffusion"))


def classify(pipe, **arguments):
    given = {"images": pictures(1), "plan": PLAN, "policy": "exhaustive", **arguments}
    return pipe(**(given if "prompts" in given else {"labels": ["seven", "cat"], "template": "a {}"} | given))


def table(pipe, prompts: list[str], plan: PairPlan = PLAN) -> np.ndarray:
    """Scores (K,) of the first picture."""
    out = classify(pipe, labels=prompts, template="{}", plan=plan)
    return np.array(list(out.scores[0].values()))


def scores_of_null(pipe) -> float:
    """Score of the first picture under the empty prompt."""
    x0 = pipe.denoiser.encode(fit_picture(pictures(1)[0], (16, 16))[None])
    return Scorer(pipe.denoiser, PLAN).table(x0, pipe.denoiser.condition(prompts=[""])).mean().item()


def test_images_in_every_form(sd):
    whole = np.random.default_rng(1).integers(0, 255, (2, 16, 16, 3), dtype=np.uint8)
    floats = whole.astype(np.float32) / 255
    tensor = torch.from_numpy(floats).permute(0, 3, 1, 2) * 2 - 1
    forms = [
        [Image.fromarray(each) for each in whole], whole, list(whole), floats, tensor, list(tensor), tuple(floats),
        (Image.fromarray(each) for each in whole),
    ]  # fmt: skip
    expected = classify(sd, images=forms[0])
    assert len(expected.labels) == 2
    for images in forms[1:]:
        out = classify(sd, images=images)
        assert_same_scores(out.scores[1], expected.scores[1])
    for one in (forms[0][0], whole[0], floats[0], tensor[0]):
        out = classify(sd, images=one)
        assert len(out.labels) == 1
        assert_same_scores(out.scores[0], expected.scores[0])


def test_several_prompts_a_label(sd):
    losses = dict(zip(("a seven", "a red seven", "a cat"), table(sd, ["a seven", "a red seven", "a cat"]), strict=True))
    prompts = {"seven": ["a seven", "a red seven"], "cat": "a cat"}
    seven = [losses["a seven"], losses["a red seven"]]
    temperature = 0.01
    mixture = -temperature * np.log(np.exp(-np.array(seven) / temperature).mean())
    for reduce, expected in (("min", min(seven)), ("mean", np.mean(seven)), ("logsumexp", mixture)):
        out = classify(sd, prompts=prompts, reduce=reduce, temperature=temperature)
        assert out.scores[0]["seven"] == pytest.approx(expected, rel=1e-5)
        assert out.scores[0]["cat"] == pytest.approx(losses["a cat"], rel=1e-5)
        assert out.labels[0] == min(out.scores[0], key=out.scores[0].get)
        assert out.evaluations == [12]
    by_template = classify(sd, template=["a {}", "a red {}"])
    assert by_template.scores[0]["seven"] == pytest.approx(min(seven), rel=1e-5)
    assert by_template.evaluations == [16]


def test_prior_and_temperature(sd):
    plain = classify(sd)
    names = list(plain.scores[0])
    scores = np.array(list(plain.scores[0].values()))
    gap = abs(scores[0] - scores[1])
    loser = names[int(np.argmax(scores))]
    for odds, label in ((0.5, plain.labels[0]), (2.0, loser)):
        # The prior overcomes the scores once T log(odds) exceeds their difference.
        prior = {name: np.exp(odds * gap / 0.1) if name == loser else 1.0 for name in names}
        out = classify(sd, prior=prior, temperature=0.1)
        assert out.labels == [label]
        assert_same_scores(out.scores[0], plain.scores[0])
        expected = posterior(scores, 0.1, np.array([prior[name] for name in names]))
        np.testing.assert_allclose(list(out.probabilities[0].values()), expected, rtol=1e-4)
        assert max(out.probabilities[0], key=out.probabilities[0].get) == label


def test_elbo_scores_are_nats(sd):
    out = classify(sd, plan=dataclasses.replace(PLAN, weighting="elbo"))
    np.testing.assert_allclose(list(out.probabilities[0].values()), posterior(np.array(list(out.scores[0].values()))), rtol=1e-6)
    assert fit_temperature(np.array([list(out.scores[0].values())]), np.array([0])) > 0


@pytest.mark.parametrize("policy", ["exhaustive", "race", FixedRounds(to_keep=(1,), n_samples=(4,), nested=False)])
def test_pmi_subtracts_the_null_prompt(sd, policy):
    plain, pmi = (classify(sd, policy=policy, pmi=wanted) for wanted in (False, True))
    null = scores_of_null(sd)
    for label, score in plain.scores[0].items():
        assert pmi.scores[0][label] == pytest.approx(score - null, abs=1e-6)
    assert pmi.labels == plain.labels
    assert pmi.error_bounds == plain.error_bounds
    assert pmi.evaluations[0] == plain.evaluations[0] + 4


def test_tree(sd):
    hierarchy = {"a red": ["seven", "three"], "a yellow": ["cat", "paper"]}
    labels = [label for group in hierarchy.values() for label in group]
    out = classify(sd, images=pictures(4), labels=labels, template="a {}", hierarchy=hierarchy, policy="tree")
    for label, scores in zip(out.labels, out.scores, strict=True):
        group = next(group for group in hierarchy.values() if label in group)
        assert {name for name, score in scores.items() if np.isfinite(score)} == set(group)
    assert max(out.evaluations) <= 16
    budget = classify(sd, labels=labels, template="a {}", hierarchy=hierarchy, policy="tree", budget=8)
    assert budget.evaluations[0] <= 8


@pytest.mark.parametrize("policy", ["exhaustive", "rounds", "race", "taylor", "dive", Race(floor=4), Exhaustive()])
def test_no_image_costs_more_than_the_budget(sd, policy):
    labels = ["seven", "cat", "three", "paper"]
    for budget in (4, 11, 30):
        out = classify(sd, labels=labels, policy=policy, budget=budget, plan=PairPlan(count=16))
        assert 4 <= out.evaluations[0] <= budget
        assert all(np.isfinite(list(out.scores[0].values())))
    out = classify(
        sd, labels=labels, template=["a {}", "a red {}"], reduce="mean", policy="race", budget=20, plan=PairPlan(count=16)
    )
    assert out.evaluations[0] <= 20


def test_callback_and_interrupt(sd):
    seen = []

    def callback(pipe, index, result):
        assert pipe is sd
        seen.append((index, result.label, result.evaluations))
        if len(seen) == 2:
            pipe.interrupt()

    out = classify(sd, images=pictures(20), batch_size=8, callback=callback)
    finished = [i for i, label in enumerate(out.labels) if label is not None]
    assert 2 <= len(finished) < 20
    assert [out.scores[i] is None for i in range(len(out.labels))] == [label is None for label in out.labels]
    assert {index for index, *_ in seen} == set(finished)
    assert None not in classify(sd, images=pictures(2)).labels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None}, "Give either labels, or prompts"),
        ({"labels": ["seven"], "prompts": {"seven": "a"}, "template": None}, "Give either labels, or prompts"),
        ({"labels": []}, r"There is nothing to tell apart: no labels. Give at least two"),
        ({"labels": ["seven"]}, r"There is nothing to tell apart: \['seven'\]"),
        ({"labels": "seven,cat"}, "labels='seven,cat' is no list"),
        ({"labels": ["cat", None]}, "is no list of names"),
        ({"labels": ["cat", " "]}, "A label is empty"),
        ({"labels": ["cat", "red", "cat"]}, "The label 'cat' is there twice"),
        ({"labels": ["cat", "red", "Cat"]}, r"'cat' and 'Cat' mean the same to this model .*words that it does not know"),
        ({"template": None}, r"'seven' and 'cat' mean .*come too late in a long prompt"),
        ({"template": "a photo"}, r"The template 'a photo' has no \{\}"),
        ({"template": ["a {}", "{ }"]}, r"The template '\{ \}' has no \{\}"),
        ({"prompts": {"a": "seven", "b": "cat"}, "template": "{}"}, "Both prompts and a template"),
        ({"prompts": {"a": "seven", "b": []}}, r"The prompts \[\] of 'b' are no strings"),
        ({"prompts": {"a": "seven", "b": [3]}}, r"The prompts \[3\] of 'b' are no strings"),
        ({"policy": "rase"}, "Unknown policy 'rase'. Did you mean 'race'"),
        ({"policy": 3}, "policy=3 is no policy"),
        ({"policy": "tree"}, "'tree' needs a hierarchy"),
        ({"hierarchy": {"a": ["seven", "cat"]}}, "takes no hierarchy"),
        ({"policy": "tree", "hierarchy": {"a": ["seven"]}}, "The hierarchy leaves out 'cat'"),
        ({"policy": "tree", "hierarchy": {"a": ["seven", "cat", "dog"]}}, "The hierarchy puts 'dog' under 'a', but there is no"),
        ({"policy": "tree", "hierarchy": {"a": ["seven", "cat"], "b": []}}, r"The hierarchy has \[\] under 'b'"),
        ({"budget": 1}, "A budget of 1 evaluations is below one pair for each of 2 classes"),
        ({"policy": Race(), "budget": 1}, "A budget of 1 evaluations is below one"),
        (
            {"policy": DIVE, "budget": 5, "labels": ["seven", "cat", "two"]},
            r"A budget of 5 evaluations is used up .* Give 6 or more",
        ),
        ({"policy": "taylor", "budget": 1}, "A budget of 1 evaluations is below one"),
        ({"policy": FixedRounds()}, "The last round wants 500 pairs, but the plan has 4"),
        ({"policy": "race", "alpha": 2.0}, "alpha=2.0 is no probability"),
        ({"metric": "l3"}, "Unknown metric 'l3'"),
        ({"reduce": "max"}, "Unknown reduction of prompts 'max'. Known: min, mean, logsumexp"),
        ({"prior": {"seven": 1, "dog": 1}}, "The prior names 'dog', but there is no such label"),
        ({"prior": {"seven": 1}}, "The prior says nothing of 'cat'"),
        ({"prior": {"seven": 1, "cat": 0}}, "must be positive"),
        ({"temperature": 0.0}, "temperature=0.0 must be positive"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"height": 13}, "height=13 does not fit the model"),
        ({"images": []}, "There are no images"),
        ({"images": None}, "NoneType is no image"),
        ({"images": ["a.png"]}, "Image 0 is str"),
        ({"images": torch.zeros(2, 3, 8, 8)}, r"Image 0 has shape \(3, 8, 8\), but the model takes \(3, 16, 16\)"),
        ({"images": torch.zeros(2, 1, 16, 16)}, r"Image 0 has shape \(1, 16, 16\)"),
        ({"images": np.zeros((16, 16, 2), np.float32)}, r"Image 0 has shape \(16, 16, 2\)"),
        ({"images": np.zeros((16, 16, 3), np.int64)}, r"Image 0 is int64 \(16, 16, 3\)"),
        ({"images": torch.full((1, 3, 16, 16), 255.0)}, "Image 0 has values from 255 to 255"),
        ({"images": torch.full((1, 3, 16, 16), float("nan"))}, "Image 0 has values from nan"),
        ({"class_labels": 3}, "takes no class_labels"),
    ],
)
def test_bad_inputs(sd, arguments, message):
    with pytest.raises(ValueError, match=message):
        classify(sd, **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": None, "prompts": {"a": "x", "b": "y"}}, "DiT is conditioned on classes, not on text"),
        ({"template": "a {}"}, "DiT is conditioned on classes"),
        ({"labels": [0, 1000]}, "Label 1000 is out of range"),
        ({"labels": [0, "shark"]}, "There is no label 'shark'"),
        ({"labels": [0, "Tinca tinca"]}, "'0' and 'Tinca tinca' mean the same to this model"),
    ],
)
def test_bad_classes(arguments, message):
    pipe = DiffusionClassifierPipeline.from_pipe(tiny.pipeline("dit"))
    assert pipe(pictures(1), labels=["0", "7"], plan=PLAN).labels[0] in ("0", "7")
    with pytest.raises(ValueError, match=message):
        pipe(pictures(1), **{"labels": [0, 1], "plan": PLAN} | arguments)


def test_non_finite_losses_stop_the_run(sd):
    hook = sd.denoiser.network.register_forward_hook(lambda _, __, output: type(output)(sample=output.sample * float("nan")))
    try:
        with pytest.raises(FloatingPointError, match="nan"):
            classify(sd, batch_size=1)
    finally:
        hook.remove()
