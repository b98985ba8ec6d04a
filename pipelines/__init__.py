"""diffusers-style pipeline objects."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "assembly": ["PartAssemblyOutput", "PartAssemblyPipeline"],
        "guided": ["GuidedPipeline", "GuidedPipelineOutput"],
        "classifier": ["Classification", "DiffusionClassifierOutput", "DiffusionClassifierPipeline"],
        "detection": ["Detections", "LayoutInversionOutput", "LayoutInversionPipeline"],
        "layout": ["LayoutPriorPipeline", "LayoutToImagePipeline"],
    },
)
