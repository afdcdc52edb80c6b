"""The atlas of failures: one interactive page to look through the misclassified images, which needs no other file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from markupsafe import Markup

from evaluation.failures.pictures import failure_pictures, rounded
from evaluation.failures.results import Failed
from evaluation.failures.summary import FailureSummary
from evaluation.study.page import page, write_text
from evaluation.study.style import has_interval
from evaluation.study.tables import counted, listed, percent

_MOST_THUMBNAILS = 10  # of a cluster
_SHARES = {
    "repaired": "made right by hiding some regions or showing only some",
    "few regions": "caused by at most two regions",
    "border": "caused mostly by regions at the border of the image",
    "background": "caused mostly off the object",
}
# options that do not matter for a single image
_OF_THE_RUN = ("samples", "most", "clusters", "min_confidence", "device", "batch_size", "workers")


def write_atlas(summary: FailureSummary, out: str | Path, title: str | None = None) -> Path:
    """Write atlas.html into a folder; the same summary gives the same bytes.

    Args:
        summary: of the failures; pictures are drawn from the stored explanations, one at a time.
        out: folder, made where it is missing.
        title: of the page.

    Returns:
        The file. Where a stored explanation is gone, the failure has no pictures.

    Raises:
        CannotWrite: the folder cannot be written to, or the disk is full; the file is whole or not there.
    """
    path, results = Path(out) / "atlas.html", summary.results
    title = title or f"Failures of {results.classifier.name} on {results.dataset.name}"
    write_text(path, page("atlas.html.j2", title=title, **_page(summary)))
    return path


def conclusion(summary: FailureSummary) -> list[str]:
    """What the failures say together, in sentences."""
    results, names = summary.results, summary.results.names
    wrong, explained = results.looked_at - results.right, len(results.failures)
    rate = f" ({wrong / results.looked_at:.1%})" if results.looked_at else ""
    text = [
        f"The model is wrong about {wrong} of {counted(results.looked_at, results.noun)}{rate}; {explained} of them are explained here."
    ]
    if summary.pairs and (often := max(summary.pairs[0].seen, summary.pairs[0].count)) > 1:
        pair = summary.pairs[0]
        text.append(f"Most frequent: {names[pair.label]} taken for {names[pair.predicted]}, {often} of {wrong}.")
    known = [f"{percent(share)} are {_SHARES.get(name, name)}" for name, share in summary.shares.items() if has_interval(share)]
    if known:
        text.append(f"Of the failures explained, {listed(known)} (in brackets, 95 % intervals).")
    if summary.suspected or summary.shortcuts:
        text.append(
            f"{counted(len(summary.suspected), 'image')} may be wrongly labelled; "
            f"{counted(len(summary.shortcuts), 'candidate')} for a shortcut {'was' if len(summary.shortcuts) == 1 else 'were'} found."
        )
    return text


def _page(summary: FailureSummary) -> dict[str, Any]:
    results, names = summary.results, summary.results.names
    lists = [("suspected", "suspected label errors", [s.sample for s in summary.suspected])] if summary.suspected else []
    lists += [(f"shortcut-{at}", f"shortcut {at}: {s.kind}", list(s.samples)) for at, s in enumerate(summary.shortcuts)]
    samples, photos = [], []
    for failed in results.failures:
        pictures, drawn = failure_pictures(failed, summary)
        member_of = [key for key, _, members in lists if failed.sample in members]
        samples.append({**_facts(failed, summary), "lists": member_of, **drawn})
        photos.append(pictures)
    place = {failed.sample: at for at, failed in enumerate(results.failures)}
    used = sorted({c for f in results.failures for c in (f.label, f.predicted)})
    return {
        "conclusions": [(results.classifier.name, conclusion(summary))],
        "data": _embedded({"classes": {str(each): names[each] for each in used}, "samples": samples}),
        "summary": summary,
        "names": names,
        "photos": photos,
        "failures": results.failures,
        "place": place,
        "typical": {
            c.number: [member for member in dict.fromkeys([c.medoid, *c.members]) if member in place][:_MOST_THUMBNAILS]
            for c in summary.clusters
        },
        "lists": [(key, text, len(members)) for key, text, members in lists],
        "share_names": {name: _SHARES.get(name, name) for name in summary.shares},
        "unsaid": listed(name.replace("_", " ") for name in unsaid) if (unsaid := results.settings.unsaid()) else "",
    }


def _facts(failed: Failed, summary: FailureSummary) -> dict[str, Any]:
    """What the script of the page needs to know of a failure, beside its pictures."""
    results, found = summary.results, failed.found
    curves = {
        name if name.startswith("mistake") else f"truth_{name}": {
            "true": rounded(each["true"]),
            "predicted": rounded(each["predicted"]),
            "right": [int(right) for right in each["right"]],
        }
        for name, each in found["curves"].items()
    }
    sets = {
        name: None if found[name] is None else {**found[name], **{k: round(found[name][k], 4) for k in ("area", "true", "predicted")}}
        for name in ("sufficient", "cause")
    }
    return {
        "id": failed.sample,
        "label": failed.label,
        "predicted": failed.predicted,
        "group": failed.group,
        "cluster": summary.cluster_of.get(failed.sample, -1),
        "confidence": rounded([found["probability_true"], found["probability_predicted"]]),
        "text": found["text"],
        "command": results.settings.command_line("debug", _OF_THE_RUN, only=failed.sample),
        "orders": {"truth": found["truth_order"], "mistake": found["mistake_order"]},
        "area": {"truth": rounded(found["truth_area"], 4), "mistake": rounded(found["mistake_area"], 4)},
        "curves": curves,
        "signed": rounded(found["causes"]),
        "peak": sum(value > 0 for value in found["causes"]),  # regions up to the peak have values above 0
        "sets": sets,
    }


def _embedded(data: Any) -> Markup:
    """JSON for a script element, escaped so that no text can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)
