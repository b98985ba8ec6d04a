"""Class tokens: the truncated gradient in closed form, the splice, the trainer, token files."""

from __future__ import annotations

import copy
import json

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from genkit import zoo
from genkit.denoisers import Cond, Denoiser
from genkit.guidance import ClassifierEnergy
from genkit.guidance.token_embedding import embedding_of, spliced, text_encoders
from genkit.guidance.training import TokenConfig, TokenTrainer
from genkit.levels import kind_of, levels_of
from genkit.pipelines import GuidedPipeline
from genkit.sampling import sample
from genkit.tokens import read_token, read_tokens, token_of, write_token
from tests import schedulers, tiny

SD = {"num_train_timesteps": 1000, "steps_offset": 1, **tiny.SCHEDULE}


class WordDenoiser(Denoiser):
    """Raw output W e, whatever x is: the final sample is linear in e, so all gradients are known."""

    family, inputs = "word", ("e",)
    network = None
    dtype, device = torch.float64, torch.device("cpu")

    def __init__(self, matrix, kind="eps"):
        self.matrix, self.kind, self.codec = matrix, kind, None
        self.evaluations = []  # of each: (level, whether there is a graph)

    def condition(self, e):
        return Cond({"e": e})

    def _forward(self, z, level, tensors):
        raise NotImplementedError

    def _evaluate(self, x, level, tensors):
        output = tensors["e"] @ self.matrix.T
        self.evaluations.append((level, output.requires_grad))
        return output, None


def ddim(n=30):
    scheduler = diffusers.DDIMScheduler(**SD, set_alpha_to_one=False, clip_sample=False)
    scheduler.set_timesteps(n)
    return scheduler


def pndm(n=30):
    scheduler = diffusers.PNDMScheduler(**SD, set_alpha_to_one=False, skip_prk_steps=True)
    scheduler.set_timesteps(n)
    return scheduler


def word(e, matrix, kind="eps"):
    return WordDenoiser(matrix, kind), Cond({"e": e})


# The truncated gradient (spec T10)


@pytest.mark.parametrize(("k", "fraction"), [(1, 0.00106), (2, 0.01337), (3, 0.02083), (5, 0.03396), (10, 0.06969)])
def test_ddim_gradient_in_closed_form(k, fraction):
    """x0 = const - sqrt(abar_f) (sigma_K - sigma_f) W e, with a logistic loss on x0."""
    torch.manual_seed(0)
    matrix, a = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    e = torch.randn(1, 3, dtype=torch.float64, requires_grad=True)
    scheduler = ddim()
    x = torch.randn(1, 6, dtype=torch.float64)
    denoiser, cond = word(e, matrix)
    x0 = sample(denoiser, scheduler, x, cond, grad_evaluations=k)
    (gradient,) = torch.autograd.grad(torch.nn.functional.logsigmoid(x0 @ a).sum(), e)

    abar = scheduler.alphas_cumprod.double()
    ratio = ((1 - abar) / abar).sqrt()
    final, last, first = ratio[0], ratio[scheduler.timesteps[-k]], ratio[scheduler.timesteps[0]]
    c = abar[0].sqrt() * (last - final)
    expected = -c * torch.sigmoid(-(x0 @ a)) * (a @ matrix)
    torch.testing.assert_close(gradient[0], expected, rtol=1e-5, atol=1e-9)
    assert ((last - final) / (first - final)).item() == pytest.approx(fraction, abs=6e-6)
    assert [abar[i].item() for i in (0, 1, 34)] == pytest.approx([0.99915, 0.998296, 0.967881], abs=1e-6)


@pytest.mark.parametrize(
    ("make", "expected"),
    [(ddim, {1: -0.0121}), (pndm, {1: -0.0278, 34: -0.2928})],
    ids=["ddim", "pndm"],
)
def test_sensitivity_of_the_last_evaluations(make, expected):
    """d x_final / d eps of single evaluations, with 30 steps: why K is counted in evaluations, and what the scheduler changes."""
    scheduler = make()
    leaves = {}

    class Leaf(WordDenoiser):
        def _evaluate(self, x, level, tensors):
            leaves[int(level.t)] = output = torch.zeros_like(x).requires_grad_(torch.is_grad_enabled())
            return output, None

    denoiser = Leaf(torch.zeros(1, 1, dtype=torch.float64))
    cond = Cond({"e": torch.zeros(1, 1, dtype=torch.float64)})
    x0 = sample(denoiser, scheduler, torch.ones(1, 1, dtype=torch.float64), cond, grad_evaluations=len(expected))
    found = torch.autograd.grad(x0.sum(), [leaves[t] for t in expected])
    assert [g.item() for g in found] == pytest.approx(list(expected.values()), abs=6e-5)


DETERMINISTIC = [
    case
    for case in schedulers.CASES
    if case.label in ("ddim", "pndm", "dpm-multi++", "dpm-single++", "unipc", "deis", "euler", "heun", "lms", "kdpm2", "flow-euler",
                      "flow-heun", "edm-euler")
]  # fmt: skip


@pytest.mark.parametrize("case", DETERMINISTIC, ids=lambda case: case.name)
def test_last_k_gradient_equals_a_difference(case):
    """With every scheduler, the gradient is that of a word that changes for the last K evaluations only."""
    torch.manual_seed(1)
    k, step = 3, 1.0  # not small: the sample is linear in the word
    matrix, x = torch.randn(4, 2, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    e, direction = torch.randn(1, 2, dtype=torch.float64), torch.randn(1, 2, dtype=torch.float64)

    class Switched(WordDenoiser):
        def __init__(self, scheduler, moved):
            super().__init__(matrix, kind_of(scheduler))
            self.first, self.moved = len(levels_of(scheduler)) - k, moved

        def _evaluate(self, x, level, tensors):
            word = tensors["e"] + (self.moved * direction if level.index >= self.first else 0)
            return super()._evaluate(x, level, {"e": word})

    def run(moved, word, evaluations):
        scheduler = case.make(6)
        return sample(Switched(scheduler, moved), scheduler, x, Cond({"e": word}), grad_evaluations=evaluations).sum()

    difference = (run(step, e, 0) - run(-step, e, 0)).item() / (2 * step)
    leaf = e.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(run(0.0, leaf, k), leaf)
    assert (gradient * direction).sum().item() == pytest.approx(difference, rel=1e-3, abs=1e-5)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("name", ["DDIMScheduler", "PNDMScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
def test_k_counts_evaluations(name):
    settings = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
    scheduler = getattr(diffusers, name)(**SD, **settings)
    scheduler.set_timesteps(5)
    denoiser, cond = word(torch.ones(1, 2, dtype=torch.float64, requires_grad=True), torch.ones(3, 2, dtype=torch.float64))
    sample(denoiser, scheduler, torch.ones(1, 3, dtype=torch.float64), cond, grad_evaluations=2)
    assert [graph for _, graph in denoiser.evaluations] == [False] * (len(scheduler.timesteps) - 2) + [True] * 2


def test_sample_refuses_more_evaluations_than_there_are():
    denoiser, cond = word(torch.ones(1, 2, dtype=torch.float64), torch.ones(3, 2, dtype=torch.float64))
    for count in (-1, 31):
        with pytest.raises(ValueError, match=f"grad_evaluations={count} must be 0 to 30"):
            sample(denoiser, ddim(), torch.ones(1, 3, dtype=torch.float64), cond, grad_evaluations=count)


# The splice


def pipeline(family="stable_diffusion"):
    """A tiny pipeline with tokenizers of its own, since loading a token extends them."""
    host = tiny.pipeline(family)
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(host, name, None) is not None:
            setattr(host, name, copy.deepcopy(getattr(host, name)))
    return GuidedPipeline.from_pipe(host)


def matrices(pipe):
    return [getattr(pipe.host, encoder).get_input_embeddings().weight for _, encoder in text_encoders(pipe.denoiser).values()]


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_splice_encodes_as_the_loaded_file_does(family, tmp_path):
    pipe = pipeline(family)
    vectors = {key: nn.Parameter(torch.randn(2, 8)) for key in text_encoders(pipe.denoiser)}
    before = [m.clone() for m in matrices(pipe)]
    length, tokenizer = len(pipe.tokenizer), pipe.tokenizer
    with spliced(pipe.denoiser, {"<x>": vectors}):
        ours = pipe.denoiser.condition(["a red <x>", "<x>"], grad=True)
    assert pipe.tokenizer is tokenizer
    assert len(pipe.tokenizer) == length
    assert all(torch.equal(a, b) for a, b in zip(before, matrices(pipe), strict=True))
    assert "forward" not in vars(pipe.text_encoder.get_input_embeddings())
    assert ours.tensors["prompt_embeds"].shape[1] == pipe.tokenizer.model_max_length  # padded, as in sampling

    write_token(tmp_path / "x.safetensors", "<x>", vectors, {})
    assert pipe.load_tokens(tmp_path / "x.safetensors") == ["<x>"]
    theirs = pipe.denoiser.condition(["a red <x>", "<x>"])
    for name, value in theirs.tensors.items():
        torch.testing.assert_close(ours.tensors[name].detach(), value, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", ["stable_diffusion", "sdxl"])
def test_splice_gives_gradients_to_the_vectors_alone(family):
    pipe = pipeline(family)
    pipe.text_encoder.requires_grad_(True)
    vectors = {key: nn.Parameter(torch.randn(1, 8)) for key in text_encoders(pipe.denoiser)}
    with spliced(pipe.denoiser, {"<x>": vectors}):
        cond = pipe.denoiser.condition(["a red <x>"], grad=True)
        assert not cond.null().tensors["prompt_embeds"].requires_grad
        loss = sum(v.sum() for v in cond.tensors.values())
        rows = torch.autograd.grad(loss, pipe.text_encoder.get_input_embeddings().weight, retain_graph=True)[0]
        gradients = torch.autograd.grad(loss, list(vectors.values()))
    assert len(rows) == len(pipe.tokenizer)
    assert all(g.abs().max() > 0 for g in gradients)


def test_prompts_with_gradients_leave_the_cache_alone():
    pipe = pipeline()
    cached = pipe.denoiser.condition("a red cat").tensors["prompt_embeds"]
    pipe.text_encoder.requires_grad_(True)
    anew = pipe.denoiser.condition("a red cat", grad=True).tensors["prompt_embeds"]
    assert anew.requires_grad
    assert torch.equal(anew, cached)
    assert not pipe.denoiser.condition("a red cat").tensors["prompt_embeds"].requires_grad


def test_splice_is_undone_after_an_error():
    pipe = pipeline()
    tokenizer = pipe.tokenizer
    with pytest.raises(RuntimeError, match="stop"), spliced(pipe.denoiser, {"<x>": {"": torch.zeros(1, 8)}}):
        raise RuntimeError("stop")
    assert pipe.tokenizer is tokenizer
    assert "forward" not in vars(pipe.text_encoder.get_input_embeddings())


@pytest.mark.parametrize(
    ("family", "tokens", "message"),
    [
        ("pixart_alpha", {}, "PixArt takes no tokens.*Stable Diffusion and Stable Diffusion XL"),
        ("sd3", {}, "Stable Diffusion 3 takes no tokens"),
        ("stable_diffusion", {"red</w>": {"": torch.zeros(1, 8)}}, "red</w> is in the tokenizer already"),
        ("stable_diffusion", {"<x>": {"": torch.zeros(1, 9)}}, r"shape \(1, 9\), but text_encoder needs \(n, 8\)"),
    ],
)
def test_splice_refuses(family, tokens, message):
    with pytest.raises(ValueError, match=message), spliced(Denoiser.of(tiny.pipeline(family)), tokens):
        pass


def test_tokens_need_the_text_encoder():
    host = tiny.pipeline("stable_diffusion")
    host.register_modules(text_encoder=None)
    with pytest.raises(ValueError, match="came without its text_encoder"):
        text_encoders(Denoiser.of(host))


def test_start_needs_a_word():
    with pytest.raises(ValueError, match="'' to start from has no tokens"):
        embedding_of(pipeline().denoiser, "")


# The trainer


def redness(x):
    return (x[:, 0] - x[:, 1]).mean((1, 2))


def blueness(x):
    return (x[:, 2] - x[:, 1]).mean((1, 2))


def config(**changes):
    return TokenConfig(**{"prompts": ("a red {token}",), "updates": 3, "steps": 3, "batch": 2, "lr": 0.5} | changes)


def vectors_of(trained):
    return {name: result.vectors[""] for name, result in trained.items()}


def test_training_raises_the_energy_and_changes_nothing_else():
    pipe = pipeline()
    pipe.text_encoder.requires_grad_(True)
    before = {name: p.clone() for name, p in pipe.text_encoder.named_parameters()}
    trained = TokenTrainer(pipe, {"x": redness}, config(updates=8, resample=False)).train()["x"]
    start = embedding_of(pipe.denoiser, "a")[""]
    with torch.no_grad():
        energies = []
        for vectors in (start, trained.vectors[""]):
            with spliced(pipe.denoiser, {"<x>": {"": vectors}}):
                pipe.denoiser.forget()
                images = pipe(["a red <x>"] * 4, seeds=range(4), num_inference_steps=3, output_type="pt").images
            energies.append(redness(images).mean().item())
    assert energies[1] > energies[0]
    assert trained.finished == "updates"
    assert trained.updates == 8
    assert trained.accuracy is None
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in pipe.text_encoder.named_parameters())
    assert all(p.grad is None for module in (pipe.unet, pipe.vae, pipe.text_encoder) for p in module.parameters())


def test_the_same_seed_trains_the_same_token_and_another_another():
    first, again, other = (
        TokenTrainer(pipeline(), {"x": redness}, config(seed=seed)).train()["x"].vectors[""] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_token_does_not_depend_on_the_others():
    both = vectors_of(TokenTrainer(pipeline(), {"x": redness, "y": blueness}, config()).train())
    alone = vectors_of(TokenTrainer(pipeline(), {"y": blueness}, config()).train())
    torch.testing.assert_close(both["y"], alone["y"], rtol=1e-3, atol=1e-4)


def test_resumed_equals_uninterrupted(tmp_path):
    energies = {"x": redness, "y": blueness}
    whole = vectors_of(TokenTrainer(pipeline(), energies, config(updates=4)).train())
    TokenTrainer(pipeline(), energies, config(updates=2)).train(tmp_path)
    with open(tmp_path / "log.jsonl", "a") as log:  # a kill can come after a line and before its checkpoint
        log.write('{"update": 3}\n')
    resumed = vectors_of(TokenTrainer(pipeline(), energies, config(updates=4)).train(tmp_path, resume=True))
    assert all(torch.equal(whole[name], resumed[name]) for name in energies)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]["tokens"]) == {"x", "y"}


def test_interruption_keeps_the_last_update(tmp_path):
    calls = []

    def interrupting(x):
        calls.append(1)
        if len(calls) == 4:  # the first is the check on blank images
            raise KeyboardInterrupt
        return redness(x)

    pipe = pipeline()
    tokenizer = pipe.tokenizer
    with pytest.raises(KeyboardInterrupt):
        TokenTrainer(pipe, {"x": interrupting}, config()).train(tmp_path)
    assert pipe.tokenizer is tokenizer
    trainer = TokenTrainer(pipeline(), {"x": redness}, config())
    resumed = trainer.train(tmp_path, resume=True)
    assert torch.equal(vectors_of(resumed)["x"], vectors_of(TokenTrainer(pipeline(), {"x": redness}, config()).train())["x"])


def test_gradient_is_clipped_after_the_backward_pass():
    trainer = TokenTrainer(pipeline(), {"x": lambda x: 1e4 * redness(x), "y": redness}, config(grad_clip=0.5))
    with trainer.prepared():
        figures = trainer.step()
    norms = {name: learner.vectors[""].grad.norm().item() for name, learner in trainer.learners.items()}
    assert figures["x"]["gradient"] > 0.5 > figures["y"]["gradient"]
    assert norms["x"] == pytest.approx(0.5, rel=1e-3)
    assert norms["y"] == pytest.approx(figures["y"]["gradient"], rel=1e-3)


class Reads:
    """An energy that says of every image whether it is right."""

    def __init__(self, right):
        self.right = right

    def __call__(self, images):
        return redness(images)

    def correct(self, images):
        return torch.full((len(images),), self.right)


def test_a_token_is_finished_when_the_guide_reads_it_right():
    trained = TokenTrainer(pipeline(), {"x": Reads(True), "y": Reads(False)}, config(updates=4, window=2)).train()
    assert (trained["x"].updates, trained["x"].finished, trained["x"].accuracy) == (2, "threshold", 1.0)
    assert (trained["y"].updates, trained["y"].finished, trained["y"].accuracy) == (4, "updates", 0.0)


def test_a_token_is_finished_when_the_loss_falls_no_more():
    trained = TokenTrainer(pipeline(), {"x": lambda x: 0 * redness(x)}, config(updates=9, patience=2)).train()
    assert (trained["x"].updates, trained["x"].finished) == (3, "patience")


def test_gradient_checkpointing_gives_the_same_token():
    pipe = pipeline()
    plain, saving = (
        TokenTrainer(pipe, {"x": redness}, config(gradient_checkpointing=on)).train()["x"].vectors[""] for on in (False, True)
    )
    torch.testing.assert_close(plain, saving, rtol=1e-4, atol=1e-5)
    assert not pipe.unet.is_gradient_checkpointing


def test_several_prompts_and_vectors_on_sdxl(tmp_path):
    pipe = pipeline("sdxl")
    settings = config(prompts=("a red {token}", "{token} on paper"), vectors=2, updates=1)
    trained = TokenTrainer(pipe, {"x": redness}, settings).train()["x"]
    assert {key: tuple(value.shape) for key, value in trained.vectors.items()} == {"clip_l": (2, 8), "clip_g": (2, 8)}
    trained.save(tmp_path / "x.safetensors", {"model": "tiny"})
    file = read_token(tmp_path / "x.safetensors")
    assert file.token == "<x>"
    assert file.metadata["model"] == "tiny"
    assert set(file.shapes) == {"clip_l", "clip_g"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": ("a red seven",)}, "'a red seven' says nowhere where the token goes"),
        ({"prompts": "a {token}"}, "must be one or several texts"),
        ({"updates": 0}, "updates=0 must be at least 1"),
        ({"evaluations": 0}, "evaluations=0 must be at least 1"),
        ({"vectors": 17}, "vectors=17 must be 1 to 16"),
        ({"lr": 0.0}, "lr=0.0 must be positive"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0 must be 0 or more"),
        ({"cfg": float("nan")}, "cfg=nan must be finite"),
        ({"seed": -1}, "seed=-1 must be 0 to"),
        ({"threshold": 1.0}, "threshold=1.0 must be 0 up to"),
    ],
)
def test_config_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        config(**changes)


def guide(**settings):
    from genkit.classifiers import load_classifier

    return ClassifierEnergy(load_classifier("digits-classifier"), "seven", **settings)


@pytest.mark.parametrize(
    ("energies", "changes", "message"),
    [
        ({}, {}, "no class to train a token for"),
        ({"Seven": redness}, {}, "'Seven' must be 1 to 40 lower-case"),
        ({"x": redness}, {"evaluations": 5}, "evaluations=5, but 3 steps of PNDMScheduler are 4 network evaluations"),
        ({"x": lambda x: x.mean()}, {}, r"must return one value for each image, shape \(2,\); got \(\)"),
        ({"x": lambda x: x @ torch.ones(3, 3)}, {}, r"guide of 'x' does not read images of shape \(2, 3, 16, 16\)"),
    ],
)
def test_trainer_refuses(energies, changes, message):
    with pytest.raises(ValueError, match=message):
        TokenTrainer(pipeline(), energies, config(**changes))


def test_trainer_refuses_a_guide_of_another_size():
    with pytest.raises(ValueError, match=r"made for images of 32 pixels, but the model draws 16.*size=32"):
        TokenTrainer(pipeline(), {"x": guide()}, config())
    TokenTrainer(pipeline(), {"x": guide(size=32)}, config())


def test_trainer_refuses_float16_and_names_that_the_tokenizer_has(tmp_path):
    with pytest.raises(ValueError, match="float16, whose gradients underflow"):
        TokenTrainer(GuidedPipeline.from_pipe(tiny.pipeline("stable_diffusion").to(torch.float16)), {"x": redness}, config())
    pipe = pipeline()
    write_token(tmp_path / "x.safetensors", "<x>", {"": torch.zeros(1, 8)}, {})
    pipe.load_tokens(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="<x> is in the tokenizer already"):
        TokenTrainer(pipe, {"x": redness}, config())


@pytest.mark.parametrize(
    ("energy", "message"),
    [
        (lambda x: redness(x) / (x.abs().sum((1, 2, 3)) == 0), "Update 1: the loss of 'x' is"),
        (lambda x: (redness(x) * 0).sqrt(), "Update 1: the gradient of 'x' is NaN"),
    ],
)
def test_what_is_not_finite_names_the_update(energy, message):
    with pytest.raises(FloatingPointError, match=message):
        TokenTrainer(pipeline(), {"x": energy}, config()).train()


def test_resume_refuses_other_settings_and_damage(tmp_path):
    TokenTrainer(pipeline(), {"x": redness}, config(updates=1)).train(tmp_path)
    with pytest.raises(ValueError, match=r"was made with cfg=2.0, not 3.0"):
        TokenTrainer(pipeline(), {"x": redness}, config(cfg=3.0)).train(tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"was made with classes=\['x'\], not \['y'\]"):
        TokenTrainer(pipeline(), {"y": redness}, config()).train(tmp_path, resume=True)
    (tmp_path / "checkpoint.pt").write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match="is damaged"):
        TokenTrainer(pipeline(), {"x": redness}, config()).train(tmp_path, resume=True)


def test_classifier_energy_says_what_it_reads():
    energy = guide()
    images = torch.rand(6, 3, 32, 32) * 2 - 1
    expected = energy.logits(images).argmax(1) == energy.target
    assert torch.equal(energy.correct(images), expected)


# Files


@pytest.mark.parametrize("name", ["", "Seven", "a b", "a_1", "-a", "a--b", "<a>", "x" * 41, "sieben\n"])
def test_names(name):
    with pytest.raises(ValueError, match="lower-case letters"):
        token_of(name)


def test_stock_pipeline_loads_the_file_and_draws_the_same_picture(tmp_path):
    pipe = GuidedPipeline.from_pretrained("digits")
    write_token(tmp_path / "mine.safetensors", "<mine>", {"": 0.05 * torch.randn(2, 128)}, {"class": "seven"})
    assert (tmp_path / "mine.safetensors").stat().st_size < 4096
    stock = diffusers.StableDiffusionPipeline.from_pretrained(zoo.path("digits"))
    stock.load_textual_inversion(str(tmp_path / "mine.safetensors"))
    pipe.load_tokens(tmp_path / "mine.safetensors")
    latents = torch.randn(1, 4, 8, 8)
    for one in (pipe, stock):
        one.scheduler = diffusers.DDIMScheduler.from_config(one.scheduler.config, clip_sample=False)
        one.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": 3, "guidance_scale": 3.0, "latents": latents, "output_type": "pt"}
    ours, theirs = (one("a red <mine>", **arguments).images for one in (pipe, stock))
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=1e-5)
    plain = pipe("a red", **arguments).images
    assert (ours - plain).abs().max() > 0.01


def test_load_tokens_forgets_what_was_encoded(tmp_path):
    pipe = pipeline()
    before = pipe.denoiser.condition("a <x>").tensors["prompt_embeds"]
    write_token(tmp_path / "x.safetensors", "<x>", {"": torch.randn(1, 8)}, {})
    pipe.load_tokens(tmp_path / "x.safetensors")
    assert not torch.equal(pipe.denoiser.condition("a <x>").tensors["prompt_embeds"], before)
    assert pipe.tokens == [read_token(tmp_path / "x.safetensors").identity]


def test_identity_is_of_the_content(tmp_path):
    for folder, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / folder).mkdir()
        write_token(tmp_path / folder / "x.safetensors", "<x>", {"": torch.full((1, 8), value)}, {})
    a, b, c = (read_token(tmp_path / folder / "x.safetensors").identity for folder in "abc")
    assert a == b != c
    assert a.startswith("<x>:")


def test_bad_token_files(tmp_path):
    def refused(name, message, error=ValueError):
        with pytest.raises(error, match=message):
            read_token(tmp_path / name)

    refused("none.safetensors", "no token file", FileNotFoundError)
    torch.save({"<x>": torch.zeros(1, 8)}, tmp_path / "x.pt")
    refused("x.pt", "is a pickle")
    write_token(tmp_path / "x.safetensors", "<x>", {"": torch.zeros(1, 8)}, {})
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-4])
    refused("cut.safetensors", "truncated or not safetensors")
    (tmp_path / "renamed.safetensors").write_bytes((tmp_path / "x.pt").read_bytes())
    refused("renamed.safetensors", "truncated or not safetensors")
    for name, tensors, message in [
        ("two", {"a": torch.zeros(1, 8), "b": torch.zeros(1, 8)}, "holds 2 tensors"),
        ("words", {"two words": torch.zeros(1, 8)}, "which is no word"),
        ("deep", {"<x>": torch.zeros(1, 1, 8)}, r"tensor of shape \(1, 1, 8\)"),
    ]:
        save_file(tensors, tmp_path / f"{name}.safetensors")
        refused(f"{name}.safetensors", message)
    with open(tmp_path / "huge.safetensors", "wb") as file:
        file.truncate(2**25)
    refused("huge.safetensors", "larger than 16 MB")
    (tmp_path / "again.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes())
    with pytest.raises(ValueError, match="both are the token <x>"):
        read_tokens([tmp_path / "x.safetensors", tmp_path / "again.safetensors"])


def test_load_refuses_what_does_not_fit_and_loads_nothing(tmp_path):
    pipe = pipeline()
    length = len(pipe.tokenizer)
    write_token(tmp_path / "good.safetensors", "<good>", {"": torch.zeros(1, 8)}, {})
    write_token(tmp_path / "wide.safetensors", "<wide>", {"": torch.zeros(1, 9)}, {})
    write_token(tmp_path / "xl.safetensors", "<xl>", {"clip_l": torch.zeros(1, 8), "clip_g": torch.zeros(1, 8)}, {})
    write_token(tmp_path / "red.safetensors", "red</w>", {"": torch.zeros(1, 8)}, {})
    for name, message in [
        ("wide", "has width 9, but this model's text_encoder has 8"),
        ("xl", "needs vectors for one text encoder"),
        ("red", "red</w> is in the tokenizer already"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe.load_tokens(tmp_path / "good.safetensors", tmp_path / f"{name}.safetensors")
    assert len(pipe.tokenizer) == length
    assert pipe.tokens == []
