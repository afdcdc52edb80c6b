"""Measure the time of a search relative to the pure forward time of as many images; prints tables of ratios.

    python scripts/bench_speed.py

Searches alternate with forward passes of the same number of images in the best batch size, so that a change of the machine's
speed affects both. The median ratio is printed. Weights hardly affect the speed, so timm models are randomly initialised.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from tqdm import tqdm

import attribution as at
import evaluation as ev
from attribution.objective import BALANCED
from attribution.search import SEARCHES
from attribution.search.budget import search_orders
from evaluation.study.tables import terminal_table
from vision_attribution.command import run_script

_LARGE = ("zoo:imagenet", "torchvision:resnet50", "timm:vit_base_patch16_224")  # the last two with random weights
_MOST_IMAGES, _ENOUGH = 2590, 0.95
BATCH_SIZES = (4, 8, 16, 32, 64, 128, 256, 512)


def seconds(job: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def forward(classifier: at.Classifier, inputs: torch.Tensor, count: int, batch_size: int) -> None:
    """Run only the model, on count images."""
    classifier.module.eval()
    done = 0
    while done < count:
        now = min(batch_size, count - done)
        classifier.module(inputs[:now])
        done += now


def best_batch_size(classifier: at.Classifier, inputs: torch.Tensor, images: int, repeats: int = 3) -> int:
    """The batch size with the least time for an image, by the median of interleaved repeats."""
    sizes = [size for size in BATCH_SIZES if size <= max(images, BATCH_SIZES[0])]
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(repeats):
        for size in sizes:
            count = max(size, images // size * size)
            times[size].append(seconds(partial(forward, classifier, inputs, count, size), classifier.device) / count)
    return min(sizes, key=lambda size: statistics.median(times[size]))


def load(spec: str, device: str) -> at.Classifier:
    return at.load_classifier(spec, device=device, pretrained=spec.startswith("zoo:"))


def prepared(spec: str, regions: int | None, device: str) -> tuple[at.Classifier, torch.Tensor, torch.Tensor]:
    classifier = load(spec, device)
    if regions is None:
        regions = 49 if classifier.preprocessing.size[0] <= 64 else 25
    image = at.load_image(at.demo_image_path())
    square = torch.nn.functional.interpolate(image[None], size=(224, 224), mode="bilinear", antialias=True)[0].clamp(0, 1)
    side = round(regions**0.5)
    rows = next(r for r in range(side, 0, -1) if regions % r == 0)
    return classifier, square, at.make_regions(square, "grid", rows=rows, columns=regions // rows).labels


def run_search(classifier: at.Classifier, image: torch.Tensor, labels: torch.Tensor, name: str) -> int:
    """Run masking, objective and search as ``explain`` does, and return the number of images forwarded."""
    masked = at.MaskedInputs(classifier, image, labels, torch.zeros_like(image))
    objective = at.SubmodularObjective(classifier, masked, 3)
    SEARCHES[name](objective)
    return objective.evaluations


@contextmanager
def model_clock(classifier: at.Classifier) -> Iterator[list[float]]:
    """Collect the seconds spent in each call of the module (on an accelerator, until the call returns)."""
    spent: list[float] = []
    starts: list[float] = []
    handles = [
        classifier.module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter())),
        classifier.module.register_forward_hook(lambda *_: spent.append(time.perf_counter() - starts[-1])),
    ]
    try:
        yield spent
    finally:
        for handle in handles:
            handle.remove()


def overhead(spec: str, search: str, regions: int | None, repeats: int, device: str) -> list[str]:
    """Time a search between two pure passes over as many images: their ratio, and the time outside the model."""
    classifier, image, labels = prepared(spec, regions, device)
    regions = int(labels.max()) + 1
    inputs = torch.randn(BATCH_SIZES[-1], 3, *classifier.preprocessing.size, device=classifier.device)
    chosen = classifier.batch_size
    best = best_batch_size(classifier, inputs, 512 if classifier.preprocessing.size[0] < 64 else 64)
    images = run_search(classifier, image, labels, search)
    ratios, outside, forwards, host = [], [], [], []
    for _ in tqdm(range(repeats), desc=f"{spec} {search}", leave=False):
        before = seconds(lambda: forward(classifier, inputs, images, best), classifier.device)
        with model_clock(classifier) as inside:
            spent = seconds(lambda: run_search(classifier, image, labels, search), classifier.device)
        after = seconds(lambda: forward(classifier, inputs, images, best), classifier.device)
        forwards.append((before + after) / 2)
        ratios.append(spent / forwards[-1])
        outside.append((spent - sum(inside)) / forwards[-1])
        host.append(1000 * (spent - sum(inside)) / len(inside))
    middle = statistics.median
    figures = [
        f"{images / middle(forwards):.0f}",
        f"{middle(ratios):.3f}",
        f"{min(ratios):.3f} - {max(ratios):.3f}",
        f"{middle(outside):.3f}",
        f"{images / len(inside):.1f}",
        f"{middle(host):.2f}",
    ]
    return [spec, search, str(regions), str(images), str(chosen), str(best), *figures]


def packed(spec: str, search: str, count: int, repeats: int, device: str) -> list[str]:
    """Time ``explain_many`` and ``explain`` one by one, alternately, on the same images: ratio of their times."""
    classifier, image, labels = prepared(spec, None, device)
    images = [image.roll(17 * shift, dims=2) for shift in range(count)]
    options = {"regions": labels, "search": search}
    jobs = {
        "alone": lambda: [at.explain(each, classifier, **options) for each in images],
        "together": lambda: at.explain_many(images, classifier, together=count, **options),
    }
    at.explain(images[0], classifier, **options)  # start-up is not measured
    ratios, inside, calls = [], [], {}
    for repeat in tqdm(range(repeats), desc=f"{spec} {search} x {count}", leave=False):
        spent, model = {}, {}
        for name in sorted(jobs, reverse=bool(repeat % 2)):
            with model_clock(classifier) as clock:
                spent[name] = seconds(jobs[name], classifier.device)
            model[name], calls[name] = sum(clock), len(clock)
        ratios.append(spent["alone"] / spent["together"])
        inside.append(model["alone"] / model["together"])
    on_cpu = classifier.device.type == "cpu"  # elsewhere a call returns before the result is computed
    alone = f"{statistics.median(inside):.2f}" if on_cpu else ""
    return [spec, search, str(count), str(calls["alone"]), str(calls["together"]), *spread(ratios), alone]


def dropped(spec: str, side: int, repeats: int, device: str) -> list[str]:
    """Time searches with dropped tokens (fill drop) and with a black fill, alternately: ratio of images per second."""
    classifier, image, _ = prepared(spec, None, device)
    labels = at.follow_patches(classifier, at.make_regions(image, "grid", rows=side, columns=side)).labels
    budget = 8 * side**2

    def rate(fill: str, evaluations: int) -> float:
        start = time.perf_counter()
        made = at.explain(image, classifier, regions=labels, search="budget", fill=fill, evaluations=evaluations)
        return made.evaluations / (time.perf_counter() - start)  # includes the curves, which end on the host, so that the time is complete

    rate("drop", side**2)  # start-up is not measured
    ratios, rates = [], []
    for _ in tqdm(range(repeats), desc=f"{spec} drop", leave=False):
        rates.append(rate("drop", budget))
        ratios.append(rates[-1] / rate("black", budget))
    return [spec, str(side**2), str(budget), f"{statistics.median(rates):.0f}", *spread(ratios)]


def ways(spec: str, device: str) -> list[list[str]]:
    """The results of ``tune``, as rows of a table."""
    classifier = load(spec, device)
    found = at.tune(at.demo_image_path(), classifier, compiled=True)
    plain = next(way for way in found if (way.precision, way.channels_last, way.compiled) == ("float32", False, False))
    return [
        [
            *(spec, way.precision, "yes" if way.channels_last else "", "yes" if way.compiled else "", f"{way.rate:.0f}"),
            *(f"{way.rate / plain.rate:.2f}", f"{way.deviation:.1g}", "chosen" if way.chosen else ""),
        ]
        for way in found
    ]


def peak_memory(spec: str, regions: int, device: str) -> tuple[int, int]:
    """Measure in its own process the memory added at the peak, by forward passes alone and by a search's first round."""
    classifier, image, labels = prepared(spec, regions, device)
    inputs = torch.randn(classifier.batch_size, 3, *classifier.preprocessing.size, device=classifier.device)
    forward(classifier, inputs, 1, 1)

    def search() -> None:
        masked = at.MaskedInputs(classifier, image, labels, torch.zeros_like(image))
        SEARCHES["greedy"](at.SubmodularObjective(classifier, masked, 3), count=1)

    alone = added_bytes(lambda: forward(classifier, inputs, 4 * len(inputs), len(inputs)), classifier.device)
    return alone, added_bytes(search, classifier.device)


def added_bytes(job: Callable[[], object], device: torch.device) -> int:
    """The memory that a job adds at its peak, in bytes (Linux or CUDA; 0 on other systems)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        job()
        return torch.cuda.max_memory_allocated(device) - before
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = resident(status, "VmRSS")
    job()
    return resident(status, "VmHWM") - before


def resident(status: Path, field: str) -> int:
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith(field)).split()[1])


def memory_rows(specs: list[str], device: str) -> list[list[str]]:
    rows = []
    for spec in specs:
        for regions in (50, 200):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                alone, search = pool.apply(peak_memory, (spec, regions, device))
            rows.append([spec, str(regions), f"{alone / 2**20:.0f}", f"{search / 2**20:.0f}"])
    return rows


def evaluation_rows() -> list[list[str]]:
    made = [prepared("zoo:cnn", regions, "cpu") for regions in (25, 49, 64, 100)]
    return [[name, *(str(run_search(*each, name)) for each in made)] for name in SEARCHES if name != "exact"]


def anytime(spec: str, device: str) -> list[str]:
    """How soon the search by budget has 95 % of the quality that it reaches with 2,590 images, and how long LiMA's images alone take."""
    classifier = load(spec, device)
    image = at.load_image(at.demo_image_path())
    small = classifier.preprocessing.size[0] <= 64
    regions = at.make_regions(image, "grid" if small else "slico", count=49)
    target = int(classifier.logits(classifier.inputs(image))[0].argmax())
    with classifier.folding():
        masked = at.MaskedInputs(classifier, image, regions.labels, torch.zeros_like(image))
        objective = at.SubmodularObjective(classifier, masked, target, BALANCED)
        begun = time.perf_counter()
        found = search_orders(objective, evaluations=_MOST_IMAGES)
        orders = [(time.perf_counter() - begun, each.evaluations, each.order) for each in found]

        @cache
        def quality(place: int) -> float:
            curves = ev.perturbation_curves(image, classifier, orders[place][2], target, regions=regions)
            return curves.insertion_auc - curves.deletion_auc

        last = len(orders) - 1
        enough = bisect_left(range(last), _ENOUGH * quality(last), key=quality)  # of the first order this good, or one after a better one
    published = run_search(*prepared("zoo:cnn", regions.count, "cpu"), "bidirectional")
    inputs = torch.randn(BATCH_SIZES[-1], 3, *classifier.preprocessing.size, device=classifier.device)
    best = best_batch_size(classifier, inputs, 512 if small else 64)
    pure = seconds(partial(forward, classifier, inputs, 10 * best, best), classifier.device) / (10 * best)
    found_at, images, _ = orders[enough]
    figures = [f"{quality(last):.3f}", str(images), f"{found_at:.1f}", f"{orders[last][0]:.1f}", str(published), f"{pure * published:.1f}"]
    return [spec, str(regions.count), str(orders[last][1]), *figures]


def spread(values: list[float]) -> list[str]:
    """The median of values, and their range."""
    return [f"{statistics.median(values):.2f}", f"{min(values):.2f} - {max(values):.2f}"]


def print_table(title: str, headings: list[str], rows: list[list[str]]) -> None:
    Console(width=None if sys.stdout.isatty() else 150).print(terminal_table(title, headings, rows, headings[:1], headings))


def main(
    model: Annotated[list[str] | None, typer.Option(help="Models to measure.")] = None,
    regions: Annotated[int | None, typer.Option(min=4, help="R of the overhead table. Default: 49 at 32 pixels, else 25.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Pairs of search and forward passes.")] = 7,
    threads: Annotated[int, typer.Option(min=1)] = 2,
    device: Annotated[str, typer.Option()] = "cpu",
) -> None:
    """Print tables: speed of searches, of several images at once, of dropped tokens and of ways to forward; peak memory; evaluations."""
    torch.set_num_threads(threads)
    specs = model or ["zoo:cnn", "zoo:vit", "timm:vit_tiny_patch16_224"]
    headings = ["model", "search", "R", "images", "batch", "best", "forward/s", "search / forward"]
    headings += ["range", "outside", "images a call", "host ms"]
    title = f"A search over the pure forward time of as many images; {threads} threads, {device}, torch {torch.__version__}"
    searches = ("bidirectional", "budget")
    print_table(title, headings, [overhead(spec, search, regions, repeats, device) for spec in specs for search in searches])
    title = "explain_many over one by one: how many times faster, and the model alone"
    headings = ["model", "search", "images", "calls alone", "together", "faster", "range", "model faster"]
    repeats = min(repeats, 3)
    print_table(title, headings, [packed(spec, search, 8, repeats, device) for spec in specs[:2] for search in searches])
    transformers = [(spec, side) for spec, side in (("zoo:vit", 8), ("timm:vit_tiny_patch16_224", 7)) if spec in specs]
    title = "fill drop over black: how many times more images a second"
    headings = ["model", "R", "images", "drop: images/s", "times", "range"]
    print_table(title, headings, [dropped(spec, side, repeats, device) for spec, side in transformers])
    title = f"Seconds to {_ENOUGH:.0%} of the quality (insertion - deletion) at {_MOST_IMAGES:,} images, search by budget, one photo"
    headings = [
        "model",
        "R",
        "images",
        "quality",
        "images to it",
        "seconds to it",
        "seconds of all",
        "LiMA's images",
        "their forward seconds",
    ]
    print_table(title, headings, [anytime(spec, device) for spec in (*specs, *(() if model else _LARGE))])
    headings = ["model", "precision", "channels last", "compiled", "images/s", "times", "deviation", ""]
    print_table("Ways to forward a batch (tune)", headings, [row for spec in specs for row in ways(spec, device)])
    print_table("Memory added at the peak, MiB", ["model", "R", "forward alone", "search"], memory_rows(specs, device))
    print_table("Images forwarded by a search of all R regions (zoo:cnn)", ["search", "25", "49", "64", "100"], evaluation_rows())


if __name__ == "__main__":
    run_script(main)
