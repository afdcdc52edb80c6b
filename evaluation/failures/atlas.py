"""The atlas of failures: one interactive page to look through the misclassified images, which needs no other file."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from evaluation.failures.pictures import failure_pictures, rounded
from evaluation.failures.results import Failed
from evaluation.failures.summary import FailureSummary
from evaluation.statistics.intervals import Interval
from evaluation.study.page import page, write_text
from evaluation.study.style import has_interval
from evaluation.study.tables import counted, listed, mean, p_value, percent

_MOST_THUMBNAILS = 10  # of a cluster
_SHARES = {
    "repaired": "made right by hiding some regions or showing only some",
    "few regions": "caused by at most two regions",
    "border": "caused mostly by regions at the border of the image",
    "background": "caused mostly off the object",
}
# options that do not matter for a single image
_OF_THE_RUN = ("samples", "most", "clusters", "min_confidence", "device", "batch_size", "workers")
_UNKNOWN = "–"  # noqa: RUF001


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
    results, names = summary.results, summary.results.classifier.class_names
    wrong, explained = results.looked_at - results.right, len(results.failures)
    rate = f" ({wrong / results.looked_at:.1%})" if results.looked_at else ""
    text = [f"The model is wrong about {wrong} of {counted(results.looked_at, 'image')}{rate}; {explained} of them are explained here."]
    if summary.pairs:
        pair = summary.pairs[0]
        text.append(f"Most frequent: {names[pair.label]} taken for {names[pair.predicted]}, {max(pair.seen, pair.count)} of {wrong}.")
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
    results, names = summary.results, summary.results.classifier.class_names
    lists = [("suspected", "suspected label errors", [s.sample for s in summary.suspected])] if summary.suspected else []
    lists += [(f"shortcut-{at}", f"shortcut {at}: {s.kind}", list(s.samples)) for at, s in enumerate(summary.shortcuts)]
    samples, tiles = [], []
    for failed in results.failures:
        pictures, drawn = failure_pictures(failed, summary)
        member_of = [key for key, _, members in lists if failed.sample in members]
        samples.append({**_facts(failed, summary), "lists": member_of, **drawn})
        tiles.append(_tile(failed, summary, pictures))
    place = {failed.sample: at for at, failed in enumerate(results.failures)}
    data = {"classes": _used_names(results.failures, names), "samples": samples}
    return {
        "conclusions": [(results.classifier.name, conclusion(summary))],
        "data": _embedded(data),
        "tiles": tiles,
        "place": place,
        "lists": [(key, text, len(members)) for key, text, members in lists],
        "highest": [(f"{area:.0%}", _known(interval, mean)) for area, interval in sorted(summary.highest.items())],
        "shares": [
            (_SHARES.get(name, name), percent(share), _known(summary.by_chance[name], percent) if name in summary.by_chance else "")
            for name, share in summary.shares.items()
            if has_interval(share)
        ],
        "fill_right": "" if summary.fill_right is None or not summary.fill_right.estimate > 0 else f"{summary.fill_right.estimate:.0%}",
        "unclustered": summary.unclustered,
        "pairs": _pairs(summary),
        "clusters": _clusters(summary, tiles, place),
        "suspected": [
            {**_confused(s.label, s.predicted, names), "sample": s.sample, "confidence": f"{s.confidence:.2f}", "reason": s.reason}
            for s in summary.suspected
        ],
        "shortcuts": [{"kind": s.kind, "text": s.text, "count": len(s.samples), "p": p_value(s.p) or _UNKNOWN} for s in summary.shortcuts],
        "groups": _groups(summary),
        "broken": results.broken,
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


def _tile(failed: Failed, summary: FailureSummary, pictures: list[dict[str, Any]]) -> dict[str, Any]:
    found = failed.found
    return {
        **_confused(failed.label, failed.predicted, summary.results.classifier.class_names),
        "sample": failed.sample,
        "link": quote(failed.sample, errors="replace"),
        "confidence": f"{found['probability_predicted']:.2f} against {found['probability_true']:.2f}",
        "cluster": summary.cluster_of.get(failed.sample, -1),
        "group": failed.group,
        "pictures": pictures,
    }


def _pairs(summary: FailureSummary) -> list[dict[str, Any]]:
    names = summary.results.classifier.class_names
    return [
        {
            **_confused(pair.label, pair.predicted, names),
            "images": max(pair.seen, pair.count),
            "count": pair.count,
            "share": f"{pair.share:.1%}" if math.isfinite(pair.share) else _UNKNOWN,
            "repaired": f"{pair.repaired} of {pair.count}",
            "cause_area": _known(pair.cause_area, percent),
            "sufficient_area": _known(pair.sufficient_area, percent),
        }
        for pair in summary.pairs
    ]


def _clusters(summary: FailureSummary, tiles: Sequence[dict[str, Any]], place: dict[str, int]) -> list[dict[str, Any]]:
    names = summary.results.classifier.class_names
    return [
        {
            **_confused(*cluster.top_pair, names),
            "number": cluster.number,
            "count": len(cluster.members),
            "p": p_value(cluster.tightness_p) or _UNKNOWN,
            "tiles": [tiles[place[m]] for m in dict.fromkeys([cluster.medoid, *cluster.members]) if m in place][:_MOST_THUMBNAILS],
        }
        for cluster in summary.clusters
    ]


def _groups(summary: FailureSummary) -> list[dict[str, Any]]:
    return [
        {
            "name": row.group,
            "link": quote(row.group, errors="replace"),
            "wrong": f"{row.wrong} of {row.images}",
            "error_rate": _known(row.error_rate, percent),
            "p_error": p_value(row.p_error) or _UNKNOWN,
            "cause_area": _known(row.cause_area, percent),
            "p_area": p_value(row.p_area) or _UNKNOWN,
        }
        for row in summary.groups
    ]


def _confused(label: int, predicted: int, names: Sequence[str]) -> dict[str, Any]:
    return {"label": names[label], "predicted": names[predicted], "pair": f"{label}-{predicted}"}


def _used_names(failures: Sequence[Failed], names: Sequence[str]) -> dict[str, str]:
    return {str(each): names[each] for each in sorted({c for f in failures for c in (f.label, f.predicted)})}


def _embedded(data: Any) -> Markup:
    """JSON for a script element, escaped so that no text can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _known(interval: Interval, write: Callable[[Interval], str]) -> str:
    return write(interval) if has_interval(interval) else _UNKNOWN
