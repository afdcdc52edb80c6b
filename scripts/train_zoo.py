"""Train the two zoo classifiers from the CIFAR-10 images: a ResNet-20, then a ViT distilled from it.

    python scripts/train_zoo.py DATA --out out/zoo

DATA holds CIFAR-10 in any layout of datasets/cifar10.toml (torchvision's own files, a folder or a tar of JPEGs). An interrupted
run continues from its last checkpoint; one is written every minute. The weights in the package are not changed.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from attribution.errors import UserError
from attribution.files import whole_file
from attribution.model.classifier import Classifier
from attribution.model.loading import load_classifier
from attribution.model.zoo import MEAN, STD, build_cnn, build_vit
from evaluation.data.recipes import ImageDataset, load_dataset
from vision_attribution.command import run_script
from vision_attribution.inputs import Stopped

CHECKPOINT_SECONDS = 60.0
QUICK_TEST = 2000  # test images for the accuracy after each epoch; the final accuracy uses all


@dataclass(frozen=True)
class Data:
    """Images uint8 [n, 3, 32, 32] and labels int64 [n] of both splits."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


@dataclass
class Training:
    """The training of one model: its steps, and the objects that a checkpoint must hold."""

    name: str
    epochs: int
    steps_per_epoch: int
    step: Callable[[int], float]
    stateful: dict[str, Any]
    result: Callable[[], nn.Module]
    teacher: str | None = None


def normalise(images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    return (images.float() / 255 - mean) / std


def augment(images: Tensor, size: int, padding: int, generator: torch.Generator) -> Tensor:
    """Pad with the mean colour, crop and flip at random, and normalise: [n, 3, size, size]."""
    padded = F.pad(normalise(images), [padding] * 4)
    count, side = len(images), padded.shape[-1]
    top, left = torch.randint(0, side - size + 1, (2, count, 1), generator=generator)
    rows, columns = top + torch.arange(size), left + torch.arange(size)
    flipped = torch.rand(count, 1, generator=generator) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    crops = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return crops.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)


def batch_indices(step: int, steps_per_epoch: int, batch_size: int, total: int, seed: int) -> Tensor:
    """Indices of the images of a step. They depend only on the step, so that a resumed run gets the same batches."""
    epoch, position = divmod(step, steps_per_epoch)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1000 + epoch))
    return order[position * batch_size : (position + 1) * batch_size]


def train_cnn(data: Data, epochs: int, seed: int, batch_size: int = 256, peak: float = 0.4) -> Training:
    """SGD with Nesterov momentum. The first 45 % of the epochs use 24-pixel crops, which take half the time."""
    torch.manual_seed(seed)
    model = build_cnn().to(memory_format=torch.channels_last).train()
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    steps_per_epoch = max(1, len(data.train_images) // batch_size)
    total, small_epochs = epochs * steps_per_epoch, round(0.45 * epochs)

    def step(index: int) -> float:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        batch = batch_indices(index, steps_per_epoch, batch_size, len(data.train_images), seed)
        small = index // steps_per_epoch < small_epochs
        images = augment(data.train_images[batch], 24 if small else 32, 0 if small else 4, generator)
        rate = peak * min((index + 1) / (0.15 * total), (total - index) / (0.85 * total))
        loss = F.cross_entropy(model(images), data.train_labels[batch])
        update(optimizer, loss, rate)
        return loss.item()

    return Training("cnn", epochs, steps_per_epoch, step, {"model": model, "optimizer": optimizer}, lambda: model)


def train_vit(data: Data, teacher: nn.Module, epochs: int, seed: int, batch_size: int = 128, peak: float = 1.2e-3) -> Training:
    """AdamW on 0.3 cross entropy + 0.7 distillation (Hinton et al., 2015; T = 2) + regression of the teacher's feature maps.

    The first 60 % of the epochs use a random window of 6x6 patches with the matching position embeddings. The resulting weights
    are an exponential moving average.
    """
    torch.manual_seed(seed)
    teacher = teacher.eval().to(memory_format=torch.channels_last)
    student = build_vit().train()
    initialise_vit(student, data.train_images[:: max(1, len(data.train_images) // 2000)])
    hints = nn.ModuleList(nn.Sequential(nn.LayerNorm(128), nn.Linear(128, channels)) for channels in (32, 64))
    trained = nn.ModuleDict({"student": student, "hints": hints})
    average = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(0.995))
    matrices = [p for p in trained.parameters() if p.ndim > 1 and p.shape[0] > 1]
    others = [p for p in trained.parameters() if not (p.ndim > 1 and p.shape[0] > 1)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98))
    steps_per_epoch = max(1, len(data.train_images) // batch_size)
    total, window_epochs = epochs * steps_per_epoch, round(0.6 * epochs)
    calibration = normalise(data.train_images[:: max(1, len(data.train_images) // 1000)])
    scales = [(m.mean((0, 2, 3)), m.std((0, 2, 3)) + 1e-6) for m in teacher_maps(teacher, calibration)[1:]]

    def step(index: int) -> float:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        batch = batch_indices(index, steps_per_epoch, batch_size, len(data.train_images), seed)
        images = augment(data.train_images[batch], 32, 4, generator)
        size = 6 if index // steps_per_epoch < window_epochs else 8
        top, left = torch.randint(0, 8 - size + 1, (2,), generator=generator).tolist()
        logits, *tokens = student_forward(student, images, top, left, size)
        teacher_logits, *maps = teacher_maps(teacher, images)
        hint_losses = []
        for hint, token, target, (mean, std) in zip(hints, tokens, maps, scales, strict=True):
            wanted = ((target.permute(0, 2, 3, 1) - mean) / std)[:, top : top + size, left : left + size].flatten(1, 2)
            hint_losses.append(F.mse_loss(hint(token), wanted))
        distilled = 4 * F.kl_div((logits / 2).log_softmax(1), (teacher_logits / 2).softmax(1), reduction="batchmean")
        loss = 0.3 * F.cross_entropy(logits, data.train_labels[batch]) + 0.7 * distilled
        loss = loss + max(0.0, 1 - 2 * index / total) * hint_losses[0] + hint_losses[1]
        rate = peak * min((index + 1) / 200, 0.5 * (1 + math.cos(math.pi * index / total)))
        update(optimizer, loss, rate, clip=list(trained.parameters()))
        average.update_parameters(student)
        return loss.item()

    stateful = {"trained": trained, "average": average, "optimizer": optimizer}
    taught_by = Classifier(teacher, size=32).weights_digest
    return Training("vit", epochs, steps_per_epoch, step, stateful, lambda: average.module, taught_by)


def update(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float, clip: list[nn.Parameter] | None = None) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    if clip:
        nn.utils.clip_grad_norm_(clip, 1.0)
    optimizer.step()


@torch.no_grad()
def teacher_maps(teacher: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, the map of layer2 averaged to 8x8, and the map of layer3."""
    early = teacher.layer2(teacher.layer1(teacher.relu(teacher.bn1(teacher.conv1(images)))))
    late = teacher.layer3(early)
    return teacher.fc(late.mean((2, 3))), F.avg_pool2d(early, 2), late


def student_forward(student: nn.Module, images: Tensor, top: int, left: int, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and the patch tokens after blocks 2 and 4, for a window of size x size patches."""
    pixels = images[:, :, 4 * top : 4 * (top + size), 4 * left : 4 * (left + size)]
    patches = student.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
    position = student.pos_embed[:, 1:].unflatten(1, (8, 8))[:, top : top + size, left : left + size].flatten(1, 2)
    start = (student.cls_token + student.pos_embed[:, :1]).expand(len(images), -1, -1)
    x = torch.cat([start, patches + position], dim=1)
    hinted = []
    for index, block in enumerate(student.blocks):
        x = block(x)
        if index in (2, 4):
            hinted.append(x[:, 1:])
    return student.head(student.norm(x)[:, 0]), hinted[0], hinted[1]


@torch.no_grad()
def initialise_vit(student: nn.Module, images: Tensor) -> None:
    """Initialise with whitened patches, sin/cos positions in channels 0-31, and heads that attend to one neighbouring patch each."""
    patches = F.unfold(normalise(images), 4, stride=4).transpose(1, 2).reshape(-1, 48)
    patches = patches - patches.mean(0)
    values, vectors = torch.linalg.eigh(patches.T @ patches / len(patches))
    whitening = (vectors / (values + 1e-2).sqrt()).T.reshape(48, 3, 4, 4)
    weight = student.patch_embed.proj.weight
    weight[:32] = 0
    weight[32:80] = 0.5 * whitening
    student.patch_embed.proj.bias.zero_()

    frequencies = 0.5 * math.pi * 0.6 ** torch.arange(8)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    angles = torch.cat([y.reshape(64, 1) * frequencies, x.reshape(64, 1) * frequencies], dim=1)
    student.pos_embed.normal_(std=0.02)
    student.pos_embed[0, 1:, :32] = torch.cat([angles.sin(), angles.cos()], dim=1)

    steps = [[(-1, 0), (1, 0), (0, -1), (0, 1)], [(-1, -1), (-1, 1), (1, -1), (1, 1)]]
    for index, block in enumerate(student.blocks):
        for head, (dy, dx) in enumerate(steps[index % 2]):
            query = block.attn.qkv.weight[32 * head : 32 * head + 32]
            key = block.attn.qkv.weight[128 + 32 * head : 128 + 32 * head + 32]
            shift = torch.cat([dy * frequencies, dx * frequencies])
            rotation = torch.cat(
                [
                    torch.cat([shift.cos().diag(), shift.sin().diag()], dim=1),
                    torch.cat([-shift.sin().diag(), shift.cos().diag()], dim=1),
                ]
            )
            query[:, :32] += 1.2 * rotation
            key[:, :32] += 1.2 * torch.eye(32)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    was_training = model.training
    model.eval()
    correct = 0
    for chunk, wanted in zip(images.split(500), labels.split(500), strict=True):
        inputs = normalise(chunk).contiguous(memory_format=torch.channels_last)
        correct += int((model(inputs).argmax(1) == wanted).sum())
    model.train(was_training)
    return correct / len(images)


def run(training: Training, data: Data, out: Path, seed: int) -> nn.Module:
    """Train from the last checkpoint to the end, then write the weights and a record of the run."""
    checkpoint = out / f"{training.name}.checkpoint.pt"
    settings = {"epochs": training.epochs, "images": len(data.train_images), "seed": seed, "teacher": training.teacher}
    start, seconds, history = resume(training, checkpoint, settings)

    def save(step: int) -> None:
        state = {name: item.state_dict() for name, item in training.stateful.items()}
        with whole_file(checkpoint) as path:
            torch.save({**state, "settings": settings, "step": step, "seconds": seconds, "history": history}, path)

    total = training.epochs * training.steps_per_epoch
    stride = max(1, len(data.test_images) // QUICK_TEST)
    tick = last_saved = time.monotonic()
    with tqdm(total=total, initial=start, desc=training.name, unit="step", mininterval=1) as bar:
        for step in range(start, total):
            loss = training.step(step)
            if not math.isfinite(loss):
                raise UserError(f"{training.name}: the loss became {loss} at step {step}; remove {checkpoint} and try another --seed")
            bar.update()
            done = step + 1
            if done % training.steps_per_epoch == 0:
                history.append(accuracy(training.result(), data.test_images[::stride], data.test_labels[::stride]))
                bar.write(f"{training.name} epoch {done // training.steps_per_epoch}/{training.epochs}: test accuracy {history[-1]:.3f}")
            now = time.monotonic()
            seconds, tick = seconds + now - tick, now
            bar.set_postfix(loss=f"{loss:.3f}", minutes=f"{seconds / 60:.1f}", refresh=False)
            if now - last_saved > CHECKPOINT_SECONDS or done == total:
                save(done)
                last_saved = now
    return finish(training, data, out, settings, seconds, history)


def resume(training: Training, checkpoint: Path, settings: dict[str, Any]) -> tuple[int, float, list[float]]:
    """Load a checkpoint if there is one: the next step, seconds spent so far, and the accuracy after each epoch."""
    if not checkpoint.exists():
        return 0, 0.0, []
    saved = torch.load(checkpoint, weights_only=True)
    if saved["settings"] != settings:
        raise UserError(f"{checkpoint} was written with {saved['settings']}, not {settings}: give another --out, or remove it")
    for name, item in training.stateful.items():
        item.load_state_dict(saved[name])
    return saved["step"], saved["seconds"], saved["history"]


def finish(training: Training, data: Data, out: Path, settings: dict[str, Any], seconds: float, history: list[float]) -> nn.Module:
    """Measure the final accuracy, and write the weights and a record of the run."""
    model = training.result().eval()
    final = accuracy(model, data.test_images, data.test_labels)
    with whole_file(out / f"{training.name}.safetensors") as path:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    record = {
        **settings,
        "test_accuracy": final,
        "accuracy_by_epoch": history,
        "minutes": round(seconds / 60, 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    with whole_file(out / f"{training.name}.json") as path:
        path.write_text(json.dumps(record, indent=2) + "\n")
    print(f"{training.name}: test accuracy {final:.4f} on {len(data.test_images)} images after {seconds / 60:.1f} minutes")
    return model


def as_tensors(dataset: ImageDataset, limit: int | None) -> tuple[Tensor, Tensor]:
    chosen = np.arange(len(dataset)) if limit is None else np.linspace(0, len(dataset) - 1, min(limit, len(dataset))).astype(int)
    images = [(dataset[int(i)].image * 255).round().to(torch.uint8) for i in tqdm(chosen, desc="reading", unit="image", leave=False)]
    if {tuple(image.shape) for image in images} != {(3, 32, 32)}:
        raise UserError("the images are not all 32x32 pixels: is this CIFAR-10?")
    return torch.stack(images), torch.tensor([dataset.labels[int(i)] for i in chosen])


def main(
    data: Annotated[Path, typer.Argument(help="Folder with CIFAR-10 (train.tar and test.tar, train/ and test/, or torchvision's).")],
    out: Annotated[Path, typer.Option(help="Where weights, records and checkpoints go.")] = Path("out/zoo"),
    teacher: Annotated[Path | None, typer.Option(help="CNN weights (safetensors) to distil; trained first when not given.")] = None,
    cnn_epochs: Annotated[int, typer.Option(min=1)] = 12,
    vit_epochs: Annotated[int, typer.Option(min=1)] = 10,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only so many images of each split.")] = None,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Annotated[int | None, typer.Option(min=1)] = None,
) -> None:
    """Train zoo:cnn (about 25 minutes on 2 cores) and zoo:vit (about 40) from the CIFAR-10 images."""
    try:
        if threads:
            torch.set_num_threads(threads)
        tensors = [as_tensors(load_dataset("cifar10", data, split), limit) for split in ("train", "test")]
        loaded = Data(*tensors[0], *tensors[1])
        if teacher is None:
            cnn = run(train_cnn(loaded, cnn_epochs, seed), loaded, out, seed)
        else:
            cnn = load_classifier("zoo:cnn", device="cpu", checkpoint=teacher).module
        run(train_vit(loaded, cnn, vit_epochs, seed), loaded, out, seed)
    except KeyboardInterrupt:
        raise Stopped("interrupted: run the same command again to continue from the last checkpoint") from None


if __name__ == "__main__":
    run_script(main)
