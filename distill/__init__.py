"""Students of pretrained diffusion models: in a few steps by adversarial distillation, and backbones by DreamTeacher.

    data = open_data("photos", pipe.denoiser, cache="run/data")                        or what `synthesize` makes of the teacher
    trainer = DistillTrainer(pipe.denoiser, data, DistillConfig(teacher="digits", steps=2000), Path("run"))
    trainer.fit(resume="latest")                                                       then `genkit export --run run --out turbo`

    run = DreamTeacher(pipe.denoiser, open_source("photos"), DreamTeacherConfig(backbone="resnet18"), Path("run"))
    export_backbone(run.fit(resume=True), run.config, Path("backbone"))             an ordinary backbone with its features

`DistillConfig` says everything about a run. What it names can be used alone: `FeatureDiscriminator`, whose heads read `TeacherTaps`
(LADD) or a `PixelEncoder` (ADD), and the random levels of the student (`LevelSampler`) and of its discriminator (`NoiseSampler`).
"""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "config": ["DistillConfig"],
        "data": ["LatentDataset", "batch_rows", "open_data"],
        "discriminator": ["FeatureDiscriminator"],
        "dreamteacher": ["DreamTeacher"],
        "dreamteacher_config": ["DreamTeacherConfig"],
        "dreamteacher_export": ["export_backbone"],
        "export": ["export_pipeline", "load_distilled"],
        "samplers": ["LevelSampler", "NoiseSampler"],
        "sources": ["PixelEncoder", "TeacherTaps"],
        "spec": ["FewStepSpec"],
        "synth": ["SynthConfig", "synthesize"],
        "trainer": ["DistillTrainer"],
    },
)
