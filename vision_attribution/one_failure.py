"""``attribution debug --only``: one misclassified image, explained, printed and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attribution.figures.failure import plot_failure
from attribution.files import slug
from evaluation.failures.measure import explain_sample
from evaluation.failures.settings import FailureSettings
from vision_attribution.inputs import save_figure, say
from vision_attribution.studies import extra

ONLY = extra("only", str, "Explain this one sample instead, by its id, and print and draw what was found.", "--only")


def one_failure(given: dict[str, Any], extras: dict[str, Any], out: Path) -> bool:
    """Explain the sample of ``--only``. Returns whether one was given."""
    sample = extras["only"]
    if sample is None:
        return False
    failure = explain_sample(FailureSettings.make(given, "the command"), sample)
    figure = out / f"{slug(sample.removesuffix(Path(sample).suffix))}.png"
    save_figure(plot_failure(failure), figure)
    say(f"{sample}: {failure.text}")
    say(f"figure: {figure}")
    return True
