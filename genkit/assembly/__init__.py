"""Part assembly: rigid geometry, candidate poses, their choice and refinement, and the measures of the benchmarks."""

from genkit._lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "couplings": ["DenoisedTarget", "Target", "TemplateTarget", "soft_targets"],
        "distances": ["chamfer", "nearest"],
        "equivalence": ["geometry_classes", "match_parts"],
        "hypotheses": ["Verdict", "agreement", "distinct", "judge", "verdict"],
        "imagined": ["Opinion", "imagine"],
        "metrics": ["PROTOCOLS", "evaluate", "find_contacts", "summarise"],
        "nearest_grid": ["NearestGrid", "Surface"],
        "parts": ["PartSet"],
        "plausible": ["gap", "overlap", "pulled", "spanning_distances"],
        "point_model": ["PointModel"],
        "point_transformer": ["PointDenoiserOutput", "PointSetTransformer"],
        "pointwise": ["PointwiseLatentDenoiser", "load_luo_hu"],
        "push": ["PushApartConfig", "push_apart"],
        "refinement": ["annealed", "refine"],
        "rigid": [
            "invert",
            "kabsch",
            "matrix_to_quaternion",
            "pose_matrix",
            "quaternion_to_matrix",
            "random_rotations",
            "transform",
        ],
        "search": ["Search"],
        "search_config": ["SearchConfig"],
        "surfaces": ["template_surface"],
        "symmetry": ["Symmetry"],
    },
)
