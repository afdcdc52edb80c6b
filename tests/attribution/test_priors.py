"""Priors: what a search begins with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from toys import SIDE, linear_classifier

import attribution as at
from attribution.masking import as_seen
from attribution.objective import BALANCED, IMAGES_PER_GRADIENT, SubmodularObjective
from attribution.priors import PRIORS, PriorMap, best_prior, prior_maps


def options(**given: Any) -> dict[str, Any]:
    return {"regions": "grid", "region_options": {"rows": 4}, "fill": "black", "evaluations": 60, **given}


def test_a_prior_saves_the_survey_and_is_counted(cat: Tensor, cnn: at.Classifier) -> None:
    """A budget below the survey's R images: without a prior it cannot even rank the regions one by one."""
    blind = at.explain(cat, cnn, **options(evaluations=20))
    begun = at.explain(cat, cnn, **options(evaluations=20, prior="grad_cam"))
    assert begun.evaluations <= 20
    assert begun.provenance["settings"]["prior"] == "grad_cam"
    assert begun.provenance["settings"]["search_options"] == {"evaluations": 20}
    assert not torch.equal(blind.order, begun.order)
    cam = at.attribute(cat, cnn, "grad_cam", begun.target)
    assert torch.equal(at.explain(cat, cnn, **options(evaluations=20 - IMAGES_PER_GRADIENT, prior=cam)).order, begun.order)
    assert at.explain(cat, cnn, **options(evaluations=17, prior=cam)).evaluations == begun.evaluations - IMAGES_PER_GRADIENT
    assert "prior" not in blind.provenance["settings"]


def test_the_least_budget_is_the_order_of_the_map(cat: Tensor, cnn: at.Classifier) -> None:
    cut = at.make_regions(cat, "grid", rows=4)
    heat = torch.rand(cat.shape[1:], generator=torch.Generator().manual_seed(0))
    made = at.explain(cat, cnn, regions=cut, fill="black", evaluations=1, prior=heat)
    means = torch.stack([heat[cut.labels == region].mean() for region in range(16)])
    assert made.order.tolist() == means.argsort(descending=True).tolist()
    assert torch.equal(at.explain(cat, cnn, regions=cut, fill="black", evaluations=1, prior=heat.numpy()).order, made.order)


def test_a_map_of_another_size_and_the_last_frame_are_resized(cat: Tensor, cnn: at.Classifier) -> None:
    coarse = torch.zeros(4, 4)
    coarse[2, 1] = 1.0
    cut = at.make_regions(cat, "grid", rows=4)
    assert int(PriorMap(coarse, "map").over(cut).argmax()) == 9
    frame = cat[:, 4:, 4:]
    last = at.explain(frame, cnn, **options())
    again = at.explain(cat, cnn, **options(evaluations=1, prior=last))
    assert again.provenance["settings"]["prior"] == "explanation"
    assert len(set(again.order[:4].tolist()) & set(last.order[:4].tolist())) >= 2


def test_means_count_the_pixels_that_the_model_sees() -> None:
    cut = at.Regions(torch.tensor([[0, 0, 1, 2], [0, 0, 1, 2]]), seen=(0, 1, 2, 3))
    values = torch.tensor([[9.0, 2.0, 3.0, 9.0], [9.0, 4.0, 5.0, 9.0]])
    assert PriorMap(values, "map").over(cut).tolist() == [3.0, 4.0, 0.0]


def test_of_several_the_one_whose_prefixes_score_best(cat: Tensor, cnn: at.Classifier) -> None:
    best = at.explain(cat, cnn, **options(evaluations=400))
    cut, target = best.regions, best.target
    order = best.to_pixels("rank")
    masked = at.MaskedInputs(cnn, cat, cut.labels, torch.zeros_like(cat))
    objective = SubmodularObjective(cnn, masked, target, BALANCED)
    maps = [PriorMap(-order, "worst", 2), PriorMap(order, "best", 3)]
    chosen = best_prior(maps, as_seen(cut, cnn), objective)
    assert (chosen.name, chosen.images, objective.evaluations) == ("best", 5, 2 * 2 * 3)
    assert best_prior(maps[:1], cut, objective) is maps[0]
    made = at.explain(cat, cnn, target, regions=cut, fill="black", evaluations=40, prior=[-order, order])
    assert made.evaluations <= 40
    assert made.insertion_auc - made.deletion_auc > 0


def test_auto_takes_what_applies(cat: Tensor, cnn: at.Classifier, vit: at.Classifier) -> None:
    for classifier in (cnn, vit):
        (made,) = prior_maps("auto", cat, classifier, None, 0)
        assert made.name in PRIORS
        assert made.images >= IMAGES_PER_GRADIENT
    black_box = at.Classifier(lambda inputs: torch.stack([inputs.mean(dim=(1, 2, 3)), inputs.amax(dim=(1, 2, 3))], dim=1), size=32)
    assert prior_maps("auto", cat, black_box, 0, 0) == []
    made = at.explain(cat, black_box, 0, **options(prior="auto"))
    assert made.provenance["settings"]["prior"] is None
    with pytest.raises(at.NotApplicable, match="is a black box"):
        at.explain(cat, black_box, 0, **options(prior="grad_cam"))
    (occlusion,) = prior_maps("occlusion", cat, black_box, 0, 0)
    assert occlusion.images == at.attribute(cat, black_box, "occlusion", 0).evaluations


def test_a_constant_map_is_not_taken_by_auto() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.head(self.conv(inputs).mean(dim=(2, 3)) * 0)

    classifier = at.Classifier(Constant(), size=8, scores="logits")
    assert prior_maps("auto", torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0)), classifier, 0, 0) == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prior": torch.zeros(3)}, "a prior is .*: expected 'auto', the name of an attribution method, a map of floats"),
        ({"prior": torch.full((4, 4), torch.nan)}, "a prior has 16 values that are not finite"),
        ({"prior": "grad_camm"}, "unknown.*grad_camm|grad_camm.*did you mean"),
        ({"prior": "auto", "search": "greedy", "evaluations": None}, "search greedy takes none: give search='budget'"),
        ({"search_options": {"prior": [1.0]}}, "expected 16 finite numbers, one for each region"),
        ({"search_options": {"prior": [1.0] * 16, "start": list(range(16))}}, "a prior and a start: give one of them"),
    ],
)
def test_what_is_no_prior_is_refused(given: dict[str, Any], message: str, cat: Tensor, cnn: at.Classifier) -> None:
    with pytest.raises(at.UserError, match=message):
        at.explain(cat, cnn, **options(**given))


@pytest.mark.parametrize("seed", range(3))
def test_regions_that_the_model_crops_away_stay_last(seed: int) -> None:
    image = torch.rand(3, SIDE, 3 * SIDE, generator=torch.Generator().manual_seed(seed))
    cropping = at.Classifier(linear_classifier(seed).module, size=SIDE, resize="short_side")
    made = at.explain(image, cropping, 0, regions="grid", region_options={"rows": 1, "columns": 6}, prior=np.ones((SIDE, 3 * SIDE)))
    assert set(made.order[-4:].tolist()) == {0, 1, 4, 5}


def test_many_images_begin_with_maps_of_their_own(cat: Tensor, cnn: at.Classifier) -> None:
    images = [cat, cat.flip(2), cat.flip(1)]
    together = at.explain_many(images, cnn, **options(prior="auto"))
    for image, made in zip(images, together, strict=True):
        alone = at.explain(image, cnn, **options(prior="auto"))
        assert (made.evaluations, made.provenance["settings"]["prior"]) == (alone.evaluations, "grad_cam")
        assert made.insertion_auc == pytest.approx(alone.insertion_auc, abs=0.02)
    black_box = at.Classifier(lambda inputs: inputs.mean(dim=(2, 3)), size=32)
    with pytest.raises(at.NotApplicable, match=r"image 0: .* is a black box"):
        at.explain_many(images, black_box, 0, **options(prior="grad_cam"))
