"""A study of its own: are the regions that cause mistakes brighter than the rest of the image?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

import attribution as at
import evaluation as ev
from attribution.provenance import pixels_digest
from evaluation.statistics import Interval
from evaluation.study import (
    PageTable,
    ReportFiles,
    Run,
    Study,
    StudySettings,
    Unit,
    csv_interval,
    csv_text,
    identity_of,
    interval_columns,
    json_text,
    named_data,
    named_model,
    plain_heading,
    plain_values,
    problems,
    record_key,
    sample_seed,
    setting,
    study_page,
    write_tables,
)


@dataclass(frozen=True, kw_only=True)
class BrightnessSettings(StudySettings):
    """What is measured; each field is an option of the command."""

    model: str = setting("zoo:cnn", short="-m", help="A name, as for explain.")
    region_count: int = setting(25, least=2, help="About how many square regions.")
    fill: str = setting("black", short="-f", help="What hides a region.")


@dataclass(frozen=True)
class BrightnessResults:
    """By sample: the brightness of the causing regions less that of the image, 0 to 1; and what failed."""

    settings: BrightnessSettings
    classifier: at.Classifier
    differences: dict[str, float]
    failures: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class BrightnessSummary:
    """The results and their mean."""

    results: BrightnessResults
    mean: Interval


def measure(run: Run[BrightnessSettings]) -> BrightnessResults:
    """Explain every misclassified image and look at its causing regions."""
    settings = run.settings
    classifier = named_model(settings, settings.model)
    dataset = named_data(settings, classifier.class_names)
    identity = identity_of(classifier)

    def unit(index: int) -> Unit:
        sample = dataset[index]
        assert sample.label is not None
        seed = sample_seed(settings.seed, sample.id)
        key = record_key(identity, pixels_digest(sample.image), sample.label, settings.fill, settings.region_count, seed)

        def explain(missing: Sequence[str]) -> Iterator[tuple[str, dict[str, object]]]:
            found = {"sample": sample.id, "difference": difference(classifier, sample, settings)}
            yield from ((part, found) for part in missing)

        return Unit({"difference": key}, explain)

    found = run.stage(dataset.choose(settings.samples, settings.seed, labels_only=True), unit, lambda index: dataset.ids[index])
    known = {dataset.ids[index]: record["difference"]["difference"] for index, record in found.items() if record}
    differences = {sample: value for sample, value in known.items() if value is not None}
    return BrightnessResults(settings, classifier, differences, tuple(problems(run, lambda index: dataset.ids[index])))


def difference(classifier: at.Classifier, sample: ev.Sample, settings: BrightnessSettings) -> float | None:
    """Brightness of the causing regions less that of the image; None where the model is right or nothing repairs it."""
    assert sample.label is not None
    options = {"count": settings.region_count}
    seed = sample_seed(settings.seed, sample.id)
    try:
        failure = at.explain_failure(
            sample.image, classifier, sample.label, regions="grid", region_options=options, fill=settings.fill, seed=seed
        )
    except at.NotMisclassified:
        return None
    regions = failure.truth.regions
    if failure.cause is None or regions is None:
        return None
    brightness = failure.truth.image.mean(dim=0)
    causing = (regions.labels[..., None] == failure.cause.regions).any(dim=-1)
    return float(brightness[causing].mean() - brightness.mean())


def summarise(results: BrightnessResults) -> BrightnessSummary:
    """The mean difference with its interval over images."""
    return BrightnessSummary(results, ev.bootstrap_interval(list(results.differences.values()), seed=results.settings.seed))


def write(summary: BrightnessSummary, out: Path) -> ReportFiles:
    """brightness.csv, brightness.json and report.html."""
    results = summary.results
    row = [results.classifier.name, *csv_interval(summary.mean), str(summary.mean.count)]
    columns = ["model", *interval_columns("difference"), "images"]
    plain = {**plain_heading(results.settings, results.classifier), "mean": plain_values(summary.mean), "differences": results.differences}
    page = study_page(
        "Brightness of the causes of mistakes",
        protocol=[("Measured", [f"mean brightness of the causing regions less that of the image, fill {results.settings.fill}"])],
        tables=[PageTable("Mean difference with its 95 % bootstrap interval over images", columns, [row])],
        failures=results.failures,
    )
    write_tables(out, {"brightness.csv": csv_text(columns, [row]), "brightness.json": json_text(plain), "report.html": page})
    return ReportFiles(out / "report.html", out / "brightness.csv", out / "brightness.json")


def show(summary: BrightnessSummary, console: Console) -> None:
    """One line."""
    console.print(f"{summary.results.classifier.name}: {summary.mean.estimate:+.3f}, {summary.mean.count} images")


BRIGHTNESS: Study[BrightnessSettings, BrightnessResults, BrightnessSummary] = Study(
    name="brightness",
    summary="Measure whether the regions that cause mistakes are brighter than the rest of the image.",
    settings=BrightnessSettings,
    measure=measure,
    summarise=summarise,
    write=write,
    show=show,
    failures=lambda results: results.failures,
)
