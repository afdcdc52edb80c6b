"""METHODS against a second derivation of each: a new method fails here until it has one."""

from __future__ import annotations

import pytest
from derivations import check_derivations

from attribution.baselines.attribute import METHODS

HERE = "attribution/baselines"
DERIVED_BY = {
    # against Captum, or gradients taken directly
    "saliency": f"{HERE}/test_gradients.py::test_saliency",
    "input_x_gradient": f"{HERE}/test_gradients.py::test_input_x_gradient",
    "integrated_gradients": f"{HERE}/test_gradients.py::test_integrated_gradients",
    "smooth_grad": f"{HERE}/test_gradients.py::test_smooth_grad",
    "gradient_shap": f"{HERE}/test_gradients.py::test_gradient_shap",
    "deep_lift": f"{HERE}/test_gradients.py::test_deep_lift",
    "guided_backprop": f"{HERE}/test_gradients.py::test_modified_gradients",
    "deconvolution": f"{HERE}/test_gradients.py::test_modified_gradients",
    "lrp": f"{HERE}/test_gradients.py::test_lrp_by_hand",
    "guided_grad_cam": f"{HERE}/test_gradients.py::test_guided_grad_cam",
    # against the naive loops of reference.py
    "grad_cam": f"{HERE}/test_cams.py::test_naive_derivations",
    "grad_cam_plus_plus": f"{HERE}/test_cams.py::test_naive_derivations",
    "layer_cam": f"{HERE}/test_cams.py::test_naive_derivations",
    "score_cam": f"{HERE}/test_cams.py::test_naive_derivations",
    "ablation_cam": f"{HERE}/test_cams.py::test_naive_derivations",
    # against Captum over the pixels, the contributions of a linear classifier, or loops over masks
    "occlusion": f"{HERE}/test_perturbation.py::test_occlusion_of_a_linear_model",
    "feature_ablation": f"{HERE}/test_perturbation.py::test_captum_over_the_pixels",
    "shapley_value_sampling": f"{HERE}/test_perturbation.py::test_captum_over_the_pixels",
    "kernel_shap": f"{HERE}/test_perturbation.py::test_captum_over_the_pixels",
    "lime": f"{HERE}/test_perturbation.py::test_captum_over_the_pixels",
    "rise": f"{HERE}/test_perturbation.py::test_rise_by_hand",
    "hsic": f"{HERE}/test_perturbation.py::test_hsic_indices",
    "sobol": f"{HERE}/test_perturbation.py::test_jansen_indices",
    # against the equations, token by token
    "attention_rollout": f"{HERE}/test_transformers.py::test_rollout",
    "transformer_attribution": f"{HERE}/test_transformers.py::test_transformer_attribution",
    "grad_eclip": f"{HERE}/test_transformers.py::test_grad_eclip",
    "attn_lrp": f"{HERE}/test_transformers.py::test_attn_lrp_without_gamma_is_the_gradient_of_the_rewritten_network",
    # closed forms
    "random": f"{HERE}/test_attribute.py::test_random_and_constant_by_hand",
    "constant": f"{HERE}/test_attribute.py::test_random_and_constant_by_hand",
    "center_prior": f"{HERE}/test_attribute.py::test_center_prior_is_a_gaussian_in_shares_of_the_sides",
    "edge_filter": f"{HERE}/test_attribute.py::test_edge_filter_by_hand",
}


def test_every_method_is_derived_a_second_time() -> None:
    check_derivations(METHODS, DERIVED_BY)


@pytest.mark.parametrize(
    ("registry", "derived_by"),
    [
        ([*METHODS, "gradient_norm"], DERIVED_BY),
        (METHODS, {**DERIVED_BY, "gone": DERIVED_BY["rise"]}),
        (METHODS, {**DERIVED_BY, "rise": f"{HERE}/test_perturbation.py::test_of_nothing"}),
    ],
)
def test_a_missing_derivation_is_found(registry: list[str], derived_by: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match=r"gradient_norm|gone|rise: no test"):
        check_derivations(registry, derived_by)
