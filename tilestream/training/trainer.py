"""Train a classifier, epoch by epoch, so that it can be interrupted and resumed."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from tilestream.engine import Streamed
from tilestream.training import checkpoint
from tilestream.training.augment import check_flips_only, check_none
from tilestream.training.config import TrainingConfig
from tilestream.training.group import ALONE, Group
from tilestream.training.history import EpochRecord, History, area_under_curve
from tilestream.training.loader import Cached, Examples, Loader, batch_count, read_batches


@dataclass(frozen=True)
class _Run:
    """What stays the same through a run."""

    net: nn.Module
    config: TrainingConfig
    device: torch.device
    bf16: bool
    class_weights: Tensor
    optimizer: torch.optim.Optimizer
    group: Group
    streamed: Streamed | None

    def backward(self, images: Any, labels: Tensor, share: Tensor) -> float:
        """Adds gradients of `share` times the weighted mean loss; returns the mean."""
        if self.streamed is not None:
            parts = self.class_weights[labels] / self.class_weights[labels].sum()
            losses = [self._stream(*each, share) for each in zip(images, labels, parts, strict=True)]
            return float(sum(losses)) / share.item()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            logits = self.net(images)
        loss = functional.cross_entropy(logits.float(), labels, self.class_weights)
        (loss * share).backward()  # type: ignore[no-untyped-call]
        return loss.item()

    def _stream(self, image: Any, label: Tensor, part: Tensor, share: Tensor) -> float:
        assert self.streamed is not None
        loss = self.streamed.backward(image, lambda z: functional.cross_entropy(z, label[None]) * (part * share))
        return loss.item()


def fit(
    net: nn.Module,
    train: Examples,
    validation: Examples,
    config: TrainingConfig,
    folder: Path,
    *,
    on_epoch: Callable[[EpochRecord], None] | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    group: Group = ALONE,
    streamed: Streamed | None = None,
) -> History:
    """Train `net` where its parameters are; it ends in eval mode with the weights of its best epoch (see `History`)
    or, by `config.keep`, its last.

    The loss is cross-entropy, weighted by n / (classes * n_class) for `balance="weights"`. Batches are of nearly equal
    size (see `Loader`): none of a single example reaches batch normalisation. Parameters with requires_grad=False stay
    as they are, and a layer of which all parameters are frozen stays in eval mode (batch norm keeps its statistics).

    `folder/checkpoint.pt` is replaced after every epoch, before `on_epoch`. Call `fit` again with the same folder to
    resume: on the same machine and thread count the weights come out bit for bit as without the interruption, for
    whatever is random derives from the seed and the epoch (on a GPU as far as PyTorch's kernels are deterministic).
    `epochs` may be raised then; a cosine schedule continues on the longer curve.

    In a `group` every process calls `fit` with the same arguments. Each takes its part of every batch, in the order and
    with the augmentation of one process; gradients are added up once a step, and validation is shared out. Without
    batch normalisation and dropout all comes out as in one process, up to rounding. Batch normalisation takes the
    statistics of a process's part, as PyTorch's DistributedDataParallel does; running statistics are averaged over
    processes after every epoch. Rank 0 alone reads and writes the checkpoint, and what it has goes to the others.

    With `streamed`, `net` as `tilestream.stream` made it, examples are images of any size that are read in windows;
    gradients are exact, a batch is accumulated image by image, and the network stays in evaluation mode: batch
    normalisation keeps its statistics (its scale and shift are trained), dropout is off. Images are flipped at most.

    Bags of descriptors, (n, D), come to the net as `read_batches` pads them, and are not augmented.

    Args:
        net: returns logits (N, classes).
        train: examples of at least two classes.
        validation: at least one example, no class that `train` lacks.
        config: the settings.
        folder: of this run alone; created if need be.
        on_epoch: called with every finished epoch.
        on_batch: called with the number of batches done and their number in this epoch.
        group: the processes that train together.
        streamed: the net, streamed, to train on whole images.

    Returns:
        All epochs, those before an interruption too.

    Raises:
        ValueError: the data cannot be trained on, or `folder` holds the checkpoint of other settings or data.
        FloatingPointError: the loss is not finite; the checkpoint of the epoch before remains.
        PeerLost: another process of the group is gone; the checkpoint of the epoch before remains.
    """
    classes = _check(net, train, validation, config, group, streamed)
    identity = checkpoint.fingerprint(net, train, validation, config)
    state = checkpoint.read(folder, identity, config.epochs) if group.rank == 0 else None
    state, best = group.share((state, checkpoint.weights(net)))
    net.load_state_dict(best)
    if streamed is None:
        share = len(train) / (len(train) + len(validation))
        train = Cached(train, int(config.cache_bytes * share))
        validation = Cached(validation, int(config.cache_bytes * (1 - share)))
    history = History()
    try:
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        run = _start(net, config, train.labels, classes, group, streamed)
        if state:
            net.load_state_dict(state["net"])
            run.optimizer.load_state_dict(state["optimizer"])
            history, best = History.model_validate_json(state["history"]), state["best"]
        while len(history.records) < config.epochs and not history.stopped_early:
            record = _epoch(run, train, validation, len(history.records) + 1, on_batch)
            history = history.add(record, config.patience)
            now = checkpoint.weights(net)
            best = now if config.keep == "last" or history.best_epoch == record.epoch else best
            content = {"fingerprint": identity, "epochs": config.epochs, "history": history.model_dump_json()}
            content |= {"net": now, "best": best, "optimizer": run.optimizer.state_dict()}
            if group.rank == 0:
                checkpoint.write(folder, content)
            if on_epoch:
                on_epoch(record)
        net.load_state_dict(best)
    finally:
        # safetensors and views need plain strides
        net.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        net.eval()
    return history


def predict(
    net: nn.Module,
    examples: Examples,
    batch_size: int = 16,
    *,
    precision: Literal["auto", "float32", "bf16"] = "auto",
    loader_threads: int = 2,
    on_batch: Callable[[], None] | None = None,
) -> np.ndarray:
    """Return the probabilities (n, classes) float64 of all examples, in their order, by `net` in eval mode.

    In float32 all logits that differ by more than 17 would give 1, and their examples be equals.

    The net's device is used and its mode restored; `precision` as in `TrainingConfig`. `on_batch` is called after each.

    Raises:
        ValueError: there are no examples.
        FloatingPointError: a logit is not finite.
    """
    if len(examples) == 0:
        raise ValueError("examples=0, must be at least 1")
    bf16 = _uses_bf16(precision, _device(net))
    logits = _logits(net, examples, _batches(len(examples), batch_size), bf16, loader_threads, on_batch)
    finite = torch.isfinite(logits).all(1)
    if not finite.all():
        raise FloatingPointError(f"the logits of example {int(finite.int().argmin())} are not finite; check its pixels")
    probabilities: np.ndarray = logits.double().softmax(1).numpy()
    return probabilities


def _check(
    net: nn.Module, train: Examples, validation: Examples, config: TrainingConfig, group: Group, streamed: Any
) -> int:
    """Return the number of logits; raise ValueError where the data and the net cannot be trained."""
    present = np.unique(train.labels)
    for name, examples in (("train", train), ("validation", validation)):
        if len(examples) == 0 or len(examples) != len(examples.labels):
            raise ValueError(f"{name} holds {len(examples)} examples, {len(examples.labels)} labels; need a label each")
        if examples.labels.dtype.kind not in "iu":
            raise ValueError(f"{name} labels are {examples.labels.dtype}, must be int64 class numbers")
    if len(present) < 2:
        raise ValueError(f"train holds class {present[0]} only; at least two are needed")
    if not set(np.unique(validation.labels)) <= set(present):
        raise ValueError(f"validation holds classes that train lacks ({present.tolist()}); split anew")
    if not any(parameter.requires_grad for parameter in net.parameters()):
        raise ValueError("no parameter of the net requires a gradient; unfreeze at least its head")
    smallest, least = len(train) // batch_count(len(train), config.batch_size), group.count * (1 if streamed else 2)
    if group.count > 1 and smallest < least:
        raise ValueError(f"ranks={group.count} are too many for batches of {smallest} examples; use fewer, or "
                         f"batch_size={least} and as many examples")  # fmt: skip
    with _mode(net, training=False), torch.no_grad():
        if streamed is None:
            images, _ = next(read_batches(train, [np.array([0])], 1, _device(net)))
            if images.ndim == 3:
                check_none(config)
        else:
            check_flips_only(config)
            images = torch.from_numpy(np.asarray(train[0][:, :256, :256]))[None].to(_device(net))
        shape: tuple[int, ...] = tuple(net(images).shape)
    if len(shape) != 2 or present[0] < 0 or present[-1] >= shape[1]:
        raise ValueError(f"logits are {shape} for one example, must be (1, classes) with classes > label {present[-1]}")
    return shape[1]


def _start(
    net: nn.Module, config: TrainingConfig, labels: np.ndarray, classes: int, group: Group, streamed: Any
) -> _Run:
    device = _device(net)
    counts = np.bincount(labels, minlength=classes)
    balanced = np.where(counts, len(labels) / ((counts > 0).sum() * np.maximum(counts, 1)), 0)
    used = balanced if config.balance == "weights" else np.ones(classes)
    trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
    parts = [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    parts = [part for part in parts if part["params"]]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parts, lr=config.learning_rate)
    else:
        optimizer = torch.optim.SGD(parts, lr=config.learning_rate, momentum=0.9)
    class_weights = torch.tensor(used, dtype=torch.float32, device=device)
    return _Run(net, config, device, _uses_bf16(config.precision, device), class_weights, optimizer, group, streamed)


def _epoch(
    run: _Run, train: Examples, validation: Examples, epoch: int, on_batch: Callable[[int, int], None] | None
) -> EpochRecord:
    """Train and validate one epoch; raise FloatingPointError before a loss that is not finite is recorded."""
    started = time.perf_counter()
    train_loss, rate = _train(run, train, epoch, on_batch)
    if run.group.count > 1:  # they are linear in the steps: averaged once is averaged each time
        statistics = [buffer for buffer in run.net.buffers() if buffer.is_floating_point()]
        run.group.add(statistics)
        for buffer in statistics:
            buffer /= run.group.count
    batches = _batches(len(validation), run.config.batch_size)
    mine = [batches[i] for i in run.group.part(np.arange(len(batches)))]
    logits = torch.zeros(len(validation), len(run.class_weights))
    if mine:
        logits[np.concatenate(mine)] = _logits(
            run.net, validation, mine, run.bf16, run.config.loader_threads, streamed=run.streamed
        )
    run.group.add([logits])
    labels = torch.from_numpy(np.asarray(validation.labels, dtype=np.int64))
    loss = functional.cross_entropy(logits.double(), labels, run.class_weights.double().cpu()).item()
    if not math.isfinite(loss):
        raise FloatingPointError(f"validation loss={loss} after epoch {epoch}; lower the learning rate")
    return EpochRecord(
        epoch=epoch,
        train_loss=train_loss,
        validation_loss=loss,
        validation_auc=area_under_curve(labels.numpy(), logits.double().softmax(1).numpy()),
        learning_rate=rate,
        seconds=time.perf_counter() - started,
    )


def _train(
    run: _Run, examples: Examples, epoch: int, on_batch: Callable[[int, int], None] | None
) -> tuple[float, float]:
    """Return the mean loss of one epoch's steps and the last learning rate."""
    loader = Loader(examples, run.config, epoch, run.device, run.group)
    trained = [parameter for part in run.optimizer.param_groups for parameter in part["params"]]
    sums = torch.zeros(2, dtype=torch.float64)  # of losses and of weights
    with _seeded(run, epoch), _mode(run.net, training=run.streamed is None):
        batches = loader if run.streamed is None else loader.whole()
        for step, ((images, labels), of_all) in enumerate(zip(batches, loader.labels(), strict=True), 1):
            rate = learning_rate(run.config, epoch - 1 + (step - 0.5) / len(loader))
            for part in run.optimizer.param_groups:
                part["lr"] = rate
            run.optimizer.zero_grad()
            weight = run.class_weights[labels].sum()
            value = run.backward(images, labels, weight / run.class_weights[of_all].sum())
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"loss={value} in epoch {epoch}, step {step} of {len(loader)}; lower learning_rate="
                    f"{run.config.learning_rate} or check the examples; epoch {epoch - 1} is kept"
                )
            run.group.add([parameter.grad for parameter in trained if parameter.grad is not None])
            run.optimizer.step()
            sums += torch.tensor([value * weight.item(), weight.item()], dtype=torch.float64)
            if on_batch:
                on_batch(step, len(loader))
    run.group.add([sums])
    return (sums[0] / sums[1]).item(), rate


def learning_rate(config: TrainingConfig, progress: float) -> float:
    """Return the learning rate after `progress` epochs: a linear warm-up, then constant or half a cosine down to 0."""
    if progress < config.warmup_epochs:
        return config.learning_rate * progress / config.warmup_epochs
    if config.schedule == "constant":
        return config.learning_rate
    done = (progress - config.warmup_epochs) / (config.epochs - config.warmup_epochs)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def _batches(count: int, batch_size: int) -> list[np.ndarray]:
    return np.array_split(np.arange(count), range(batch_size, count, batch_size))


def _logits(
    net: nn.Module,
    examples: Examples,
    batches: list[np.ndarray],
    bf16: bool,
    threads: int,
    on_batch: Callable[[], None] | None = None,
    streamed: Streamed | None = None,
) -> Tensor:
    """Return the logits (n, classes) float32 of the examples in batches, on the CPU."""
    device = _device(net)
    if streamed is not None:
        with torch.no_grad():
            return torch.cat([streamed(examples[int(i)]).float().cpu() for batch in batches for i in batch])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    with _mode(net, training=False), torch.inference_mode(), _exact_kernels(), autocast:
        found = []
        for images, _ in read_batches(examples, batches, threads, device):
            found.append(net(images).float().cpu())
            if on_batch:
                on_batch()
        return torch.cat(found)


def _device(net: nn.Module) -> torch.device:
    return next(net.parameters()).device


def _uses_bf16(precision: str, device: torch.device) -> bool:
    if precision != "auto":
        return precision == "bf16"
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


@contextmanager
def _mode(net: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the net into train or eval mode, layers with frozen parameters only into eval mode; restore all modes."""
    before = {module: module.training for module in net.modules()}
    net.train(training)
    for module in net.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(parameter.requires_grad for parameter in own):
            module.training = False
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


def _exact_kernels() -> AbstractContextManager[None]:
    """Return a context in which cuDNN repeats itself and float32 means float32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


@contextmanager
def _seeded(run: _Run, epoch: int) -> Iterator[None]:
    """Let torch's global generators (dropout draws from them) start from the seed and the epoch; restore them."""
    key = (run.config.seed, epoch, 2, *([run.group.rank] if run.group.rank else []))
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)
    on_gpu = run.device.type == "cuda"
    with torch.random.fork_rng([run.device] if on_gpu else []), _exact_kernels():
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[run.device.index].manual_seed(seed)
        yield
