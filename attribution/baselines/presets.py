"""Settings of attribution methods as the reference code of two papers has them; what is not named stays at its default."""

from __future__ import annotations

from typing import Any

from attribution.fills import MODEL_MEAN, Fill

# xplique and Captum both start from, and hide pixels by, zero in the units of the normalised input: the model's mean colour.
PRESET_FILLS: dict[str, Fill] = {"lima": MODEL_MEAN, "lima-clip": MODEL_MEAN, "rao": MODEL_MEAN}

# SMDL (ICLR 2024) and LiMA (2025) call xplique; Rao, Boehle and Schiele (CVPR 2022) call Captum.
METHOD_PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "lima": {
        "saliency": {"channels": "max"},
        "input_x_gradient": {"channels": "mean"},
        "integrated_gradients": {"steps": 80, "rule": "riemann_trapezoid", "channels": "mean"},
        "smooth_grad": {"samples": 80, "noise": 0.2, "absolute": False, "channels": "mean"},
        "grad_cam_plus_plus": {"spatial": "mean", "weight": "mean"},
        "occlusion": {"window": 10, "stride": 5, "overlap": "sum"},
        "rise": {"samples": 4000, "grid": 7, "keep": 0.5, "normalisation": "observed"},
        "kernel_shap": {"samples": 1000, "regions": "quickshift"},
        "lime": {"samples": 1000, "model": "ridge", "alpha": 2.0, "distance": "euclidean", "kernel_width": 45.0, "regions": "quickshift"},
        "hsic": {"samples": 500, "grid": 8, "design": "sobol"},
        "sobol": {"designs": 32, "grid": 8, "perturbation": "inpainting"},
        "grad_eclip": {"heads": "single"},
        "transformer_attribution": {"variant": "lrp"},
    },
    "lima-clip": {
        "rise": {"samples": 500, "grid": 7, "keep": 0.5, "normalisation": "observed", "output": "probability"},
        "integrated_gradients": {"steps": 80, "rule": "riemann_trapezoid", "channels": "mean", "output": "probability"},
        "saliency": {"channels": "max", "output": "probability"},
        "grad_eclip": {"heads": "single", "output": "logit"},
    },
    "rao": {
        "saliency": {"channels": "sum", "absolute": True},
        "input_x_gradient": {"channels": "sum"},
        "integrated_gradients": {"steps": 20, "rule": "gausslegendre", "channels": "sum"},
        "guided_backprop": {"channels": "sum", "absolute": True},
        "grad_cam_plus_plus": {"spatial": "sum", "weight": "sum", "exponential": True},
        "occlusion": {"window": 16, "stride": 8, "overlap": "sum", "border": "across"},
        "score_cam": {"weights": "score", "output": "probability"},
        "rise": {"samples": 6000, "grid": 6, "keep": 0.1, "normalisation": "expected"},
    },
}
