"""Learning, resuming, stopping, failing."""

import json

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from tilestream.training import EpochRecord, History, TrainingConfig, checkpoint, fit, predict
from tilestream.training.history import area_under_curve
from tilestream.training.trainer import learning_rate


def settings(**changes):
    return TrainingConfig(**{"epochs": 4, "batch_size": 16, "learning_rate": 0.02, **changes})


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(name == again and torch.equal(value, copy) for (name, value), (again, copy) in pairs)


def roc_auc(labels, probabilities):
    scores = probabilities[:, 1] if probabilities.shape[1] == 2 else probabilities
    return roc_auc_score(labels, scores, multi_class="ovr")


class Interrupted(Exception):
    pass


def interrupt_after(epoch):
    def on_epoch(record):
        if record.epoch == epoch:
            raise Interrupted

    return on_epoch


@pytest.mark.parametrize(("classes", "balance", "optimizer"), [(2, "weights", "adamw"), (3, "sampling", "sgd")])
def test_learns_blobs(blobs, small_net, tmp_path, classes, balance, optimizer):
    net, test = small_net(classes), blobs(200, 3, classes)
    config = settings(
        epochs=12, balance=balance, optimizer=optimizer, rotation_deg=15, colour=0.1, warmup_epochs=1, cache_bytes=10**8
    )
    history = fit(net, blobs(256, 1, classes), blobs(100, 2, classes), config, tmp_path)
    probabilities = predict(net, test)
    assert probabilities.dtype == np.float64
    assert probabilities.shape == (200, classes)
    untrained = roc_auc(test.labels, predict(small_net(classes), test))
    assert untrained < 0.8
    assert roc_auc(test.labels, probabilities) > 0.95
    assert history.records[-1].train_loss < history.records[0].train_loss
    assert not any(module.training for module in net.modules())
    assert all(value.is_contiguous() for value in net.state_dict().values())
    assert History.model_validate_json(history.model_dump_json()) == history


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_resumed_equals_uninterrupted_bit_for_bit(blobs, small_net, tmp_path, stop):
    train, validation = blobs(41, 1), blobs(30, 2)
    config = settings(rotation_deg=20, colour=0.1, warmup_epochs=1.5, balance="sampling")
    whole, resumed = small_net(), small_net()
    expected = fit(whole, train, validation, config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(resumed, train, validation, config, tmp_path / "cut", on_epoch=interrupt_after(stop))
    again = small_net(seed=5)  # its own weights do not matter: the checkpoint's do
    torch.rand(3)
    seen = []
    free = config.model_copy(update={"loader_threads": 5, "cache_bytes": 10**7})
    history = fit(again, train, validation, free, tmp_path / "cut", on_epoch=lambda record: seen.append(record.epoch))
    assert seen == list(range(stop + 1, 5))
    assert same_weights(whole, again)
    drop = {"records": {"__all__": {"seconds"}}}
    assert history.model_dump(exclude=drop) == expected.model_dump(exclude=drop)
    states = [checkpoint.torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("whole", "cut")]
    assert all(torch.equal(states[0]["net"][name], states[1]["net"][name]) for name in states[0]["net"])


def test_global_random_state_is_left_alone_and_has_no_effect(blobs, small_net, tmp_path):
    nets = [small_net(), small_net()]
    for number, net in enumerate(nets):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        fit(net, blobs(32, 1), blobs(20, 2), settings(epochs=1), tmp_path / str(number))
        assert torch.equal(before, torch.get_rng_state())
    assert same_weights(*nets)
    fit(other := small_net(), blobs(32, 1), blobs(20, 2), settings(epochs=1, seed=1), tmp_path / "seed")
    assert not same_weights(nets[0], other)


def test_finished_run_is_read_not_repeated_and_epochs_may_be_raised(blobs, small_net, tmp_path):
    train, validation = blobs(32, 1), blobs(20, 2)
    net, again = small_net(), small_net(seed=3)
    history = fit(net, train, validation, settings(epochs=2), tmp_path)
    assert fit(again, train, validation, settings(epochs=2), tmp_path) == history
    assert same_weights(net, again)
    longer = fit(again, train, validation, settings(epochs=3), tmp_path)
    assert longer.records[:2] == history.records
    assert len(longer.records) == 3
    with pytest.raises(ValueError, match=r"made with epochs=3, epochs=2 must not be lower"):
        fit(again, train, validation, settings(epochs=2), tmp_path)


def test_another_configuration_or_data_set_is_refused_by_name(blobs, small_net, tmp_path):
    train, validation = blobs(32, 1), blobs(20, 2)
    fit(small_net(), train, validation, settings(epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"made with learning_rate=0.02, this run has 0.5; use"):
        fit(small_net(), train, validation, settings(epochs=1, learning_rate=0.5), tmp_path)
    with pytest.raises(ValueError, match="made with train examples=32, this run has 34"):
        fit(small_net(), blobs(34, 1), validation, settings(epochs=1), tmp_path)
    with pytest.raises(ValueError, match="made with validation pixels="):
        fit(small_net(), train, blobs(20, 7), settings(epochs=1), tmp_path)
    with pytest.raises(ValueError, match="made with net="):
        fit(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), train, validation, settings(epochs=1), tmp_path)


def test_best_epoch_is_kept(blobs, small_net, tmp_path):
    train, validation, net, after = blobs(64, 1), blobs(40, 2), small_net(), []

    def on_epoch(record):
        after.append({name: value.clone() for name, value in net.state_dict().items()})
        if record.epoch == 3:
            train.labels[:] = 1 - train.labels  # from here on it gets worse

    history = fit(net, train, validation, settings(epochs=9, schedule="constant"), tmp_path, on_epoch=on_epoch)
    aucs = [record.validation_auc for record in history.records]
    assert 3 <= history.best_epoch < 9
    assert aucs[history.best_epoch - 1] == max(aucs) > aucs[-1]
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in after[history.best_epoch - 1].items())
    assert not torch.equal(after[-1]["9.weight"], net.state_dict()["9.weight"])
    assert roc_auc_score(validation.labels, predict(net, validation)[:, 1]) == max(aucs)


def test_the_last_epoch_is_kept_if_asked(blobs, small_net, tmp_path):
    train, validation, net, after = blobs(64, 1), blobs(40, 2), small_net(), []

    def on_epoch(record):
        after.append({name: value.clone() for name, value in net.state_dict().items()})
        if record.epoch == 3:
            train.labels[:] = 1 - train.labels

    config = settings(epochs=9, schedule="constant", keep="last")
    history = fit(net, train, validation, config, tmp_path, on_epoch=on_epoch)
    assert history.best_epoch < 9
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in after[-1].items())
    again = small_net()
    train.labels[:] = 1 - train.labels  # as at the start, which the checkpoint remembers
    fit(again, train, validation, config, tmp_path)
    assert same_weights(again, net)


def test_keeping_the_last_epoch_does_not_go_with_stopping_by_auc():
    with pytest.raises(ValueError, match=r"keep=last and patience=3.* give patience=0"):
        settings(keep="last", patience=3)


def test_early_stopping(blobs, small_net, tmp_path):
    noise = blobs(40, 1)
    noise.labels = np.random.default_rng(0).integers(0, 2, 40)
    validation = blobs(30, 2)
    config = settings(epochs=60, patience=3)
    history = fit(small_net(), noise, validation, config, tmp_path)
    assert history.stopped_early
    assert len(history.records) == history.best_epoch + 3 < 60
    assert fit(small_net(), noise, validation, config, tmp_path) == history


def record(epoch, auc, loss):
    return EpochRecord(epoch=epoch, train_loss=1, validation_loss=loss, validation_auc=auc, learning_rate=1, seconds=1)


def test_history_picks_by_auc_then_loss_and_says_when_there_is_no_auc():
    history = History()
    for entry in [record(1, 0.7, 0.5), record(2, 0.8, 0.9), record(3, 0.8, 0.8), record(4, 0.8, 0.8)]:
        history = history.add(entry, patience=0)
    assert (history.best_epoch, history.best_by, history.stopped_early) == (3, "validation_auc", False)
    blind = History().add(record(1, None, 0.5), 1).add(record(2, None, 0.4), 1)
    assert (blind.best_epoch, blind.best_by, blind.stopped_early) == (2, "validation_loss", False)
    assert blind.add(record(3, None, 0.6), 1).stopped_early
    assert json.loads(blind.model_dump_json())["records"][0]["validation_auc"] is None


def test_one_class_in_validation_falls_back_to_the_loss(blobs, small_net, tmp_path):
    validation = blobs(10, 2)
    validation.labels = np.zeros(10, np.int64)
    history = fit(small_net(), blobs(32, 1), validation, settings(epochs=2), tmp_path)
    assert history.best_by == "validation_loss"
    assert history.best_epoch == 1 + int(np.argmin([entry.validation_loss for entry in history.records]))


def test_area_under_curve_is_scikit_learns():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 4, 60), rng.dirichlet(np.ones(4), 60)
    assert area_under_curve(labels, scores) == pytest.approx(roc_auc_score(labels, scores, multi_class="ovr"))
    two = (labels > 1).astype(int)
    assert area_under_curve(two, scores[:, :2]) == roc_auc_score(two, scores[:, 1])
    some = labels != 2
    wanted = np.mean([roc_auc_score(labels[some] == c, scores[some, c]) for c in (0, 1, 3)])
    assert area_under_curve(labels[some], scores[some]) == pytest.approx(wanted)
    assert area_under_curve(np.ones(5, int), scores[:5]) is None


def test_class_weights_balance_the_loss(blobs, small_net, tmp_path):
    """A net that sees nothing learns the prior of the loss: the classes' shares, or with weights equal ones."""
    train, validation = blobs(40, 1), blobs(10, 2)
    train.labels = (np.arange(40) < 8).astype(np.int64)
    train.images[:], validation.images[:] = 1, 1
    found = {}
    for balance in ("none", "weights", "sampling"):
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))
        nn.init.zeros_(net[2].weight)
        config = settings(epochs=60, balance=balance, batch_size=40, learning_rate=0.05, flips=False)
        fit(net, train, validation, config, tmp_path / balance)
        last = torch.load(tmp_path / balance / "checkpoint.pt", weights_only=True)["net"]
        net.load_state_dict(last)
        found[balance] = predict(net, validation)[0, 1]
    assert found["none"] == pytest.approx(0.2, abs=0.03)
    assert found["weights"] == pytest.approx(0.5, abs=0.03)
    assert found["sampling"] == pytest.approx(0.5, abs=0.03)


def test_nan_names_epoch_and_step_and_keeps_the_last_checkpoint(blobs, small_net, tmp_path):
    train, validation, net = blobs(64, 1), blobs(20, 2), small_net()

    def poison(record):
        if record.epoch == 2:
            train.images[:] = np.nan

    with pytest.raises(FloatingPointError, match=r"loss=nan in epoch 3, step 1 of 4; lower learning_rate=0.02"):
        fit(net, train, validation, settings(), tmp_path, on_epoch=poison)
    kept = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(json.loads(kept["history"])["records"]) == 2
    assert all(torch.isfinite(value).all() for value in kept["net"].values())
    with pytest.raises(FloatingPointError, match="validation loss=nan after epoch 1"):
        fit(small_net(), validation, train, settings(), tmp_path / "other")
    with pytest.raises(FloatingPointError, match="logits of example 0 are not finite"):
        predict(small_net(), train)


def test_checkpoint_is_whole_or_the_one_before(blobs, small_net, tmp_path, monkeypatch):
    train, validation = blobs(32, 1), blobs(20, 2)
    with pytest.raises(Interrupted):
        fit(small_net(), train, validation, settings(), tmp_path, on_epoch=interrupt_after(1))
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def torn(content, file):
        file.write(before[: len(before) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.torch, "save", torn)
        with pytest.raises(OSError, match="No space left"):
            fit(small_net(), train, validation, settings(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    (tmp_path / "checkpoint.pt.abc.part").write_bytes(b"left by a killed run")
    assert len(fit(small_net(), train, validation, settings(), tmp_path).records) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]
    (tmp_path / "checkpoint.pt").write_bytes(before[:1000])
    with pytest.raises(ValueError, match="no readable checkpoint; delete it"):
        fit(small_net(), train, validation, settings(), tmp_path)


def test_frozen_layers_do_not_move(blobs, small_net, tmp_path):
    net = small_net()
    for module in net[:3]:
        module.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    fit(net, blobs(32, 1), blobs(20, 2), settings(epochs=2), tmp_path)
    after = net.state_dict()
    frozen = [name for name in before if name.startswith(("0.", "1."))]
    assert "1.running_mean" in frozen
    assert all(torch.equal(before[name], after[name]) for name in frozen)
    assert not torch.equal(before["4.running_mean"], after["4.running_mean"])
    assert not torch.equal(before["9.weight"], after["9.weight"])


def test_odd_counts_and_callbacks(blobs, small_net, tmp_path):
    """33 examples in batches of 32 would leave one alone: batch norm over 1 x 1 maps would fail."""
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3, 2))
    steps = []
    fit(
        net,
        blobs(33, 1),
        blobs(20, 2),
        settings(epochs=1, batch_size=32),
        tmp_path,
        on_batch=lambda *s: steps.append(s),
    )
    assert steps == [(1, 2), (2, 2)]


def test_predict_is_the_net_in_eval_mode_in_order(blobs, small_net):
    net, examples = small_net().train(), blobs(23, 4)
    got = predict(net, examples, 5, loader_threads=3)
    assert net.training
    with torch.no_grad():
        wanted = net.eval()(torch.from_numpy(examples.images)).softmax(1).numpy()
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    coarse = predict(net, examples, 5, precision="bf16")
    assert 0 < np.abs(coarse - wanted).max() < 0.05


def test_bf16_trains(blobs, small_net, tmp_path):
    history = fit(small_net(), blobs(32, 1), blobs(20, 2), settings(epochs=2, precision="bf16"), tmp_path)
    exact = fit(small_net(), blobs(32, 1), blobs(20, 2), settings(epochs=2), tmp_path / "float32")
    assert history.records[0].train_loss != exact.records[0].train_loss
    assert history.records[0].train_loss == pytest.approx(exact.records[0].train_loss, rel=0.05)


def test_learning_rate_schedule():
    cosine = settings(epochs=10, warmup_epochs=2, learning_rate=1)
    rates = [learning_rate(cosine, progress) for progress in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0])
    assert learning_rate(settings(schedule="constant", learning_rate=0.3), 3.9) == 0.3


def test_refusals(blobs, small_net, tmp_path):
    good, lonely, third = blobs(12, 1), blobs(12, 1), blobs(12, 1)
    lonely.labels = np.ones(12, np.int64)
    third.labels = np.arange(12) % 3
    with pytest.raises(ValueError, match="class 1 only"):
        fit(small_net(), lonely, good, settings(), tmp_path)
    with pytest.raises(ValueError, match="validation holds classes that train lacks"):
        fit(small_net(), good, third, settings(), tmp_path)
    with pytest.raises(ValueError, match=r"logits are \(1, 2\) .* classes > label 2"):
        fit(small_net(), third, good, settings(), tmp_path)
    with pytest.raises(ValueError, match="validation holds 0 examples"):
        fit(small_net(), good, blobs(0, 1), settings(), tmp_path)
    with pytest.raises(ValueError, match="unfreeze"):
        fit(small_net().requires_grad_(False), good, good, settings(), tmp_path)
    with pytest.raises(ValueError, match="examples=0"):
        predict(small_net(), blobs(0, 1))
    with pytest.raises(ValueError, match=r"warmup_epochs=4.0 must be below epochs=4"):
        settings(warmup_epochs=4)
    with pytest.raises(ValueError, match="Extra inputs"):
        settings(momentum=0.8)


@pytest.mark.gpu
def test_gpu_resumes_bit_for_bit(blobs, small_net, tmp_path):
    train, validation, config = blobs(41, 1), blobs(30, 2), settings(rotation_deg=20, colour=0.1)
    whole, cut = small_net().cuda(), small_net().cuda()
    fit(whole, train, validation, config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        fit(cut, train, validation, config, tmp_path / "cut", on_epoch=interrupt_after(2))
    fit(cut, train, validation, config, tmp_path / "cut")
    assert same_weights(whole, cut)
    assert next(cut.parameters()).is_cuda
    assert predict(cut, validation).shape == (30, 2)


class Brightness(nn.Module):
    """Logits 0 and 20 times the mean."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(20.0))

    def forward(self, x):
        return torch.stack([torch.zeros(len(x)), self.scale * x.mean((1, 2, 3))], 1)


def test_certain_examples_stay_apart(blobs):
    """Logits of 20 and 40 are both 1 in float32, and would be equals to a ranking."""
    examples = blobs(2, 1)
    examples.images[:] = np.array([1, 1.5], np.float32)[:, None, None, None]
    first, second = predict(Brightness(), examples)[:, 1]
    assert second > first > 1 - 1e-8
