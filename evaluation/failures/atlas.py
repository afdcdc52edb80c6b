"""The atlas of failures: one interactive page to look through the misclassified samples, which needs no other file."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from evaluation.failures.pictures import failure_pictures, rounded
from evaluation.failures.results import Failed
from evaluation.failures.settings import FailureSettings
from evaluation.failures.summary import FailureSummary
from evaluation.statistics.intervals import Interval
from evaluation.study.page import page, write_text
from evaluation.study.style import has_interval

_MOST_THUMBNAILS = 10  # of a cluster
_SHARES = {
    "repaired": "made right by hiding or keeping some regions",
    "few regions": "caused by at most two regions",
    "border": "caused mostly by regions at the border of the image",
    "background": "caused mostly off the object",
}
_NOT_SAID = ("samples", "most", "clusters", "min_confidence", "device", "batch_size")  # of the whole run: they change no single sample
_SAID_OF_REGIONS = ("count",)


def write_atlas(summary: FailureSummary, out: str | Path, title: str | None = None) -> Path:
    """Write atlas.html into a folder; the same summary gives the same bytes.

    Args:
        summary: of the failures; the pictures are read from the stored explanations, one at a time.
        out: folder, made where it is missing.
        title: of the page.

    Returns:
        The file. A failure whose stored explanation is gone is shown without pictures.

    Raises:
        UserError: the folder cannot be written to, or the disk is full; the file is whole or not there.
    """
    path, results = Path(out) / "atlas.html", summary.results
    title = title or f"Failures of {results.classifier.name} on {results.dataset.name}"
    write_text(path, page("atlas.html.j2", title=title, **_page(summary)))
    return path


def conclusion(summary: FailureSummary) -> list[str]:
    """What the failures say as a whole, in sentences."""
    results, names = summary.results, summary.results.classifier.class_names
    wrong, explained = results.looked_at - results.right, len(results.failures)
    rate = f" ({wrong / results.looked_at:.1%})" if results.looked_at else ""
    text = [f"The model is wrong about {wrong} of {_counted(results.looked_at, 'image')}{rate}; {explained} of them are explained here."]
    if summary.pairs:
        pair = summary.pairs[0]
        text.append(f"Most frequent: {names[pair.label]} taken for {names[pair.predicted]}, {max(pair.seen, pair.count)} of {wrong}.")
    known = [f"{_percent(share)} are {_SHARES.get(name, name)}" for name, share in summary.shares.items() if has_interval(share)]
    if known:
        text.append(f"Of the failures explained, {_listed(known)} (in brackets, 95 % intervals).")
    if summary.suspected or summary.shortcuts:
        text.append(
            f"{_counted(len(summary.suspected), 'sample')} may be wrongly labelled; "
            f"{_counted(len(summary.shortcuts), 'candidate')} for a shortcut {'was' if len(summary.shortcuts) == 1 else 'were'} found."
        )
    return text


def command(settings: FailureSettings, model: str, sample: str) -> str:
    """The command line that explains one sample again under the same settings, quoted for a shell.

    Args:
        settings: of the run; defaults and what concerns other samples only are left out.
        model: name of the classifier, said where the settings hold an object.
        sample: id.
    """
    defaults = {f.name: f.default for f in fields(FailureSettings)}
    given: list[tuple[str, Any]] = [("data", settings.data), ("model", settings.model if isinstance(settings.model, str) else model)]
    for name, value in settings.plain().items():
        if name == "region_options":
            given += [(f"region_{option}", each) for option, each in value.items() if option in _SAID_OF_REGIONS]
        elif name not in ("data", "model", *_NOT_SAID) and value is not None and value != defaults[name]:
            given.append((name, value))
    words = ["attribution", "debug"]
    for name, value in [*given, ("only", sample)]:
        option, text = f"--{name.replace('_', '-')}", str(value)
        words += [f"{option}={text}"] if text.startswith("-") else [option, text]
    return shlex.join(words)


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
        "highest": [(f"{area:.0%}", _mean(interval)) for area, interval in sorted(summary.highest.items())],
        "shares": [
            (_SHARES.get(name, name), _percent(share), _percent(summary.by_chance[name]) if name in summary.by_chance else "")
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
        "shortcuts": [{"kind": s.kind, "text": s.text, "count": len(s.samples), "p": _p(s.p)} for s in summary.shortcuts],
        "groups": _groups(summary),
        "broken": results.broken,
        "unsaid": _unsaid(results.settings),
    }


def _facts(failed: Failed, summary: FailureSummary) -> dict[str, Any]:
    """What the script needs to know of a failure, without its pictures."""
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
        "command": command(results.settings, results.classifier.name, failed.sample),
        "orders": {"truth": found["truth_order"], "mistake": found["mistake_order"]},
        "area": {"truth": rounded(found["truth_area"], 4), "mistake": rounded(found["mistake_area"], 4)},
        "curves": curves,
        "signed": rounded(found["causes"]),
        "peak": sum(value > 0 for value in found["causes"]),  # the regions before the peak are those above 0
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
            "share": f"{pair.share:.1%}" if math.isfinite(pair.share) else "–",  # noqa: RUF001
            "repaired": f"{pair.repaired} of {pair.count}",
            "cause_area": _percent(pair.cause_area),
            "sufficient_area": _percent(pair.sufficient_area),
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
            "p": _p(cluster.tightness_p),
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
            "error_rate": _percent(row.error_rate),
            "p_error": _p(row.p_error),
            "cause_area": _percent(row.cause_area),
            "p_area": _p(row.p_area),
        }
        for row in summary.groups
    ]


def _confused(label: int, predicted: int, names: Sequence[str]) -> dict[str, Any]:
    return {"label": names[label], "predicted": names[predicted], "pair": f"{label}-{predicted}"}


def _unsaid(settings: FailureSettings) -> str:
    """What the command lines cannot say, because it was given as an object."""
    said = {
        "model": isinstance(settings.model, str),
        "fill": isinstance(settings.fill, str),
        "region options": set(settings.region_options) <= set(_SAID_OF_REGIONS),
    }
    missing = [name for name, known in said.items() if not known]
    return (
        f"The command cannot say all of the {_listed(missing)} of this run, which came from Python or a file: complete it."
        if missing
        else ""
    )


def _used_names(failures: Sequence[Failed], names: Sequence[str]) -> dict[str, str]:
    return {str(each): names[each] for each in sorted({c for f in failures for c in (f.label, f.predicted)})}


def _embedded(data: Any) -> Markup:
    """JSON for a script element: nothing in it can end the element or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def _percent(interval: Interval) -> str:
    if not has_interval(interval):
        return "–"  # noqa: RUF001
    return f"{100 * interval.estimate:.0f} % [{100 * interval.low:.0f}, {100 * interval.high:.0f}]"


def _mean(interval: Interval) -> str:
    if not has_interval(interval):
        return "–"  # noqa: RUF001
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _p(value: float) -> str:
    return "–" if not math.isfinite(value) else "< 0.001" if value < 0.001 else f"{value:.3f}"  # noqa: RUF001


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _listed(names: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
