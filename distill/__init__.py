"""Few-step students of pretrained diffusion models: data, adversarial distillation, export."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "data": ["LatentDataset", "batch_rows", "open_data"],
        "export": ["export_pipeline", "load_distilled"],
        "spec": ["FewStepSpec"],
        "synth": ["SynthConfig", "synthesize"],
    },
)
