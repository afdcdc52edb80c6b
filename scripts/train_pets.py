"""Train a classifier of the 37 breeds of Oxford-IIIT Pet on any backbone of timm, and write it as one self-describing file.

    python scripts/train_pets.py DATA --out out/pets/lite.safetensors
    python scripts/train_pets.py DATA --model timm:deit_small_patch16_224 --blocks 1 --out out/pets/vit.safetensors

DATA is the folder that torchvision.datasets.OxfordIIITPet(DATA, download=True) wrote. The backbone is frozen. Without ``--blocks`` a
multinomial logistic regression on its features becomes the classifier. With ``--blocks N`` the last N blocks of a vision transformer,
its norm and a new head are trained, a share of the patch tokens dropped at random. An interrupted run continues where it stopped.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

import attribution as at
from attribution.errors import UserError
from attribution.files import whole_file
from attribution.model.classifier import Classifier
from evaluation.data.recipes import load_dataset
from vision_attribution.command import run_script
from vision_attribution.inputs import Stopped

CHUNK = 256  # photos whose features are one file of the work folder
PENALTIES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
VALIDATION = 6  # one of so many train photos chooses the penalty
_ALIASES = {"zoo:imagenet": "timm:tf_efficientnet_lite0"}  # what builds the same module with another number of classes


@dataclass(frozen=True)
class Settings:
    """What the result depends on; rates, penalties and shares as in the README of the published classifiers."""

    model: str
    checkpoint: str | None
    backbone: str
    blocks: int
    epochs: int
    batch_size: int
    rate: float
    head_rate: float
    weight_decay: float
    dropped_tokens: float
    dropout: float
    smoothing: float
    limit: int | None
    seed: int


def features_of(classifier: Classifier, inputs: Tensor, blocks: int) -> Tensor:
    """What the trained part is given: pooled features [n, D], or the tokens [n, T, D] before the last ``blocks`` blocks."""
    module: Any = classifier.module
    if not blocks:
        return module.forward_head(module.forward_features(inputs), pre_logits=True)
    taken: list[Tensor] = []

    class _Reached(Exception):
        """Ends the forward pass where the trained part begins."""

    def stop(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        taken.append(arguments[0])
        raise _Reached

    handle = module.blocks[-blocks].register_forward_pre_hook(stop)
    try:
        module(inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return taken[0]


def check_backbone(classifier: Classifier, blocks: int) -> None:
    """Refuse what the two ways of training cannot do."""
    module: Any = classifier.module
    if not all(hasattr(module, name) for name in ("forward_features", "forward_head", "reset_classifier")):
        raise UserError(f"{classifier.name} is no model of timm: expected timm:NAME or zoo:imagenet")
    count = len(module.blocks) if isinstance(getattr(module, "blocks", None), nn.Sequential) and hasattr(module, "pool") else 0
    if blocks and not count:
        raise UserError(f"--blocks is {blocks}, and {classifier.name} is no vision transformer of timm: leave --blocks out")
    if blocks > count:
        raise UserError(f"--blocks is {blocks}: {classifier.name} has {count}")


def extract(classifier: Classifier, split: str, data: Path, work: Path, settings: Settings) -> tuple[Tensor, Tensor]:
    """Features and labels of a split, in chunks that a later run finds again."""
    dataset = load_dataset("pets", data, split)
    order = dataset.choose(settings.limit, settings.seed)
    parts = []
    with tqdm(total=len(order), desc=f"features, {split}", unit="photo") as bar:
        for start in range(0, len(order), CHUNK):
            chosen = order[start : start + CHUNK]
            path = work / f"{split}-{start:05d}.safetensors"
            if not path.is_file():
                made = []
                for index in chosen:
                    with torch.no_grad():
                        made.append(features_of(classifier, classifier.inputs(dataset.image(index)), settings.blocks).cpu().half())
                    bar.update()
                with whole_file(path) as temporary:
                    save_file({"features": torch.cat(made).contiguous()}, temporary)
            else:
                bar.update(len(chosen))
            parts.append(load_file(path)["features"])
    return torch.cat(parts), torch.tensor([dataset.labels[index] for index in order])


def logistic(features: Tensor, labels: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
    """Weights [C, D] and bias [C] of a multinomial logistic regression: mean cross entropy + penalty / 2 * |w|^2, standardised features."""
    from sklearn.linear_model import LogisticRegression

    x = features.double().numpy()
    mean, std = x.mean(axis=0), x.std(axis=0) + 1e-6
    fitted = LogisticRegression(C=1 / (penalty * len(x)), max_iter=2000).fit((x - mean) / std, labels.numpy())
    weight = fitted.coef_ / std
    return torch.from_numpy(weight).float(), torch.from_numpy(fitted.intercept_ - weight @ mean).float()


def train_head(module: Any, features: Tensor, labels: Tensor, classes: int) -> dict[str, Any]:
    """Fit the classifier on pooled features. A sixth of the photos chooses the penalty; then all are used."""
    if int(labels.unique().numel()) < classes:
        raise UserError(f"only {labels.unique().numel()} of {classes} breeds are among the train photos: use more photos")
    held = torch.arange(len(labels)) % VALIDATION == 0
    accuracies = {}
    for penalty in tqdm(PENALTIES, desc="penalty", unit="fit"):
        weight, bias = logistic(features[~held].float(), labels[~held], penalty)
        accuracies[penalty] = float(((features[held].float() @ weight.T + bias).argmax(dim=1) == labels[held]).float().mean())
    best = max(accuracies, key=lambda penalty: (accuracies[penalty], penalty))
    module.reset_classifier(classes)
    head = module.get_classifier()
    weight, bias = logistic(features.float(), labels, best)
    with torch.no_grad():
        head.weight.copy_(weight.reshape(head.weight.shape))
        head.bias.copy_(bias)
    return {"penalty": best, "validation_accuracy": accuracies[best]}


def train_blocks(module: Any, features: Tensor, labels: Tensor, classes: int, work: Path, settings: Settings) -> dict[str, Any]:
    """Train the last blocks, the norm and a new head with AdamW and a cosine schedule; a checkpoint after every epoch."""
    torch.manual_seed(settings.seed)
    module.reset_classifier(classes)
    head = module.get_classifier()
    nn.init.zeros_(head.bias)
    nn.init.trunc_normal_(head.weight, std=0.02)
    blocks = module.blocks[-settings.blocks :]
    trained = nn.ModuleDict({"blocks": blocks, "norm": module.norm, "fc_norm": module.fc_norm, "head": head})
    body = [value for name, value in trained.named_parameters() if not name.startswith("head.")]
    groups = [{"params": body, "peak": settings.rate}, {"params": list(head.parameters()), "peak": settings.head_rate}]
    optimizer = torch.optim.AdamW(groups, lr=settings.rate, weight_decay=settings.weight_decay)
    checkpoint, begun = work / "training.pt", 0
    if checkpoint.is_file():
        saved = torch.load(checkpoint, weights_only=True)
        trained.load_state_dict(saved["trained"])
        optimizer.load_state_dict(saved["optimizer"])
        begun = saved["epoch"]
    steps = max(1, math.ceil(len(labels) / settings.batch_size))
    total = settings.epochs * steps
    trained.train()
    with tqdm(total=total, initial=begun * steps, desc="training", unit="step") as bar:
        for epoch in range(begun, settings.epochs):
            for step, batch in enumerate(_batches(len(labels), epoch, settings)):
                index = epoch * steps + step
                generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + index)
                tokens = _thinned(features[batch].float(), module.num_prefix_tokens, settings.dropped_tokens, generator)
                pooled = module.fc_norm(module.pool(module.norm(blocks(tokens))))
                kept = torch.rand(pooled.shape, generator=generator) >= settings.dropout
                logits = head(pooled * kept / (1 - settings.dropout))
                loss = F.cross_entropy(logits, labels[batch], label_smoothing=settings.smoothing)
                if not math.isfinite(loss.item()):
                    raise UserError(f"the loss became {loss.item()} in epoch {epoch + 1}: use a smaller --rate")
                for group in optimizer.param_groups:
                    group["lr"] = group["peak"] * 0.5 * (1 + math.cos(math.pi * index / total))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                bar.update()
            with whole_file(checkpoint) as path:
                torch.save({"trained": trained.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}, path)
    module.eval()
    return {}


def _batches(count: int, epoch: int, settings: Settings) -> Iterator[Tensor]:
    """The photos of an epoch's steps. They depend on nothing but seed and epoch, so that a resumed run takes the same."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed * 1000 + epoch))
    return iter(order.split(settings.batch_size))


def _thinned(tokens: Tensor, prefix: int, share: float, generator: torch.Generator) -> Tensor:
    """The tokens [n, T, D] without a random share of each photo's patches."""
    patches = tokens.shape[1] - prefix
    kept = torch.rand(len(tokens), patches, generator=generator).argsort(dim=1)[:, : max(1, round(patches * (1 - share)))] + prefix
    index = torch.cat([torch.arange(prefix).expand(len(tokens), prefix), kept], dim=1)
    return tokens.gather(1, index[:, :, None].expand(-1, -1, tokens.shape[2]))


def accuracy(classifier: Classifier, data: Path, settings: Settings) -> dict[str, Any]:
    """Top-1 and top-5 of the finished file on the test photos, through its own preprocessing."""
    dataset = load_dataset("pets", data, "test")
    order = dataset.choose(settings.limit, settings.seed)
    ranks = []
    for index in tqdm(order, desc="test", unit="photo"):
        logits = classifier.logits(classifier.inputs(dataset.image(index)))[0]
        ranks.append(int((logits > logits[dataset.labels[index]]).sum()))
    return {"test_photos": len(ranks), "top1": float(np.mean(np.array(ranks) < 1)), "top5": float(np.mean(np.array(ranks) < 5))}


def work_folder(out: Path, settings: Settings) -> Path:
    """The folder of what a later run continues from, if it was made with these settings."""
    work = out.with_suffix(".work")
    kept, wanted = work / "settings.json", asdict(settings)
    if kept.is_file() and (found := json.loads(kept.read_text(encoding="utf-8"))) != wanted:
        other = ", ".join(f"{name} {found.get(name)!r}" for name in wanted if found.get(name) != wanted[name])
        raise UserError(f"{work} was begun with {other}: give another --out, or remove it")
    work.mkdir(parents=True, exist_ok=True)
    with whole_file(kept) as path:
        path.write_text(json.dumps(wanted, indent=2) + "\n", encoding="utf-8")
    return work


def train(data: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Train, write the file and its record, and remove the work folder."""
    names = load_dataset("pets", data, "trainval").class_names  # data that are missing are said before a model is loaded
    classifier = at.load_classifier(
        settings.model, checkpoint=settings.checkpoint, pretrained=settings.backbone == "pretrained", device="cpu"
    )
    check_backbone(classifier, settings.blocks)
    work = work_folder(out, settings)
    features, labels = extract(classifier, "trainval", data, work, settings)
    module = classifier.module
    if settings.blocks:
        found = train_blocks(module, features, labels, len(names), work, settings)
    else:
        found = train_head(module, features, labels, len(names))
    weights = work / "weights.safetensors"
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, weights)
    spec = _ALIASES.get(settings.model, settings.model)
    finished = at.load_classifier(spec, checkpoint=weights, class_names=names, device="cpu")
    out.parent.mkdir(parents=True, exist_ok=True)
    at.save_classifier(finished, out, dtype=torch.float16)
    record = {**asdict(settings), **found, "train_photos": len(labels), **accuracy(at.load_classifier(out, device="cpu"), data, settings)}
    with whole_file(out.with_suffix(".json")) as path:
        path.write_text(json.dumps({**record, "torch": torch.__version__}, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(work)
    return record


def main(
    data: Annotated[Path, typer.Argument(help="Folder that torchvision's OxfordIIITPet wrote.")],
    out: Annotated[Path, typer.Option(help="File of the classifier; its record lies beside it as .json.")] = Path(
        "out/pets/lite.safetensors"
    ),
    model: Annotated[str, typer.Option(help="Backbone: zoo:imagenet or timm:NAME.")] = "zoo:imagenet",
    checkpoint: Annotated[Path | None, typer.Option(help="Weights of a timm backbone in place of the published ones.")] = None,
    pretrained: Annotated[bool, typer.Option(help="Published weights of the backbone, else random ones.")] = True,
    blocks: Annotated[int, typer.Option(min=0, help="Train so many last blocks of a vision transformer; 0: the classifier alone.")] = 0,
    epochs: Annotated[int, typer.Option(min=1, help="With --blocks.")] = 24,
    batch_size: Annotated[int, typer.Option(min=1, help="With --blocks.")] = 64,
    rate: Annotated[float, typer.Option(min=0, help="Peak rate of the blocks; that of the head is ten times it.")] = 2e-4,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many photos of each split.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Train a classifier of pet breeds, measure it on the test photos, and write it as one file."""
    if out.suffix != ".safetensors":
        raise UserError(f"--out is {out}: expected a file that ends in .safetensors")
    own = None if checkpoint is None else str(checkpoint)
    settings = Settings(
        model, own, "pretrained" if pretrained else "random", blocks, epochs, batch_size, rate, 10 * rate, 0.1, 0.3, 0.2, 0.05, limit, seed
    )
    try:
        torch.manual_seed(seed)  # of a backbone with random weights
        record = train(data, out, settings)
    except KeyboardInterrupt:
        raise Stopped("interrupted: run the same command again to continue") from None
    typer.echo(f"{out}: top-1 {record['top1']:.1%}, top-5 {record['top5']:.1%} of {record['test_photos']} test photos")


if __name__ == "__main__":
    run_script(main)
