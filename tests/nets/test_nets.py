import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from tilestream.nets import (
    ResidualNet,
    build,
    convert,
    load_model,
    load_weights,
    resnet18,
    resnet34,
    resnet50,
    save_model,
)


@pytest.mark.parametrize("size", [(1024, 1024), (97, 130), (1, 64)])
def test_residual_net_takes_any_size(size):
    net = ResidualNet(num_classes=4, widths=(4, 4, 6, 8, 8)).eval()
    with torch.no_grad():
        maps = net.segments(net.relu(net.bn(net.stem(torch.zeros(1, 3, *size)))))
        assert net(torch.zeros(2, 3, *size)).shape == (2, 4)
    assert maps.shape[2:] == tuple(-(-n // 64) for n in size)


def test_residual_net_is_the_papers():
    net = ResidualNet()
    convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 1 + 5 * 3
    assert [s[0].conv3.out_channels for s in net.segments] == [32, 64, 128, 256, 512]
    assert all(isinstance(s[0].skip, nn.MaxPool2d) for s in net.segments)
    assert len([m for m in ResidualNet(blocks=2).modules() if isinstance(m, nn.MaxPool2d)]) == 5


def test_residual_net_refuses_to_shrink_channels():
    with pytest.raises(ValueError, match="channels_out=16 must be at least channels_in=32"):
        ResidualNet(widths=(32, 16))


@pytest.mark.parametrize("size_px", [3, 7])
def test_local_average_is_of_the_pixels_inside_the_image(size_px):
    x, margin = torch.rand(1, 2, 9, 13, dtype=torch.float64), size_px // 2
    found = ResidualNet(widths=(4,), local_average_px=size_px).detail(x)
    for i in range(9):
        for j in range(13):
            square = x[..., max(i - margin, 0) : i + margin + 1, max(j - margin, 0) : j + margin + 1]
            torch.testing.assert_close(found[..., i, j], x[..., i, j] - square.mean((2, 3)), rtol=0, atol=1e-14)


def test_colour_and_its_slow_change_are_nothing_to_a_network_with_local_average():
    net = ResidualNet(widths=(4, 4), local_average_px=5).double().eval()
    x = torch.rand(1, 3, 40, 40, dtype=torch.float64)
    shade = torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64)[None, :, None, None]
    with torch.no_grad():
        torch.testing.assert_close(net(x + shade), net(x), rtol=0, atol=1e-12)
    assert not torch.allclose(ResidualNet(widths=(4, 4)).double().eval()(x + shade), net(x))


@pytest.mark.parametrize("size_px", [4, 1, -3])
def test_local_average_refuses_a_side_without_a_middle(size_px):
    with pytest.raises(ValueError, match=f"size_px={size_px} of the local average must be odd, at least 3"):
        ResidualNet(local_average_px=size_px)


@pytest.mark.parametrize("size_px", [21.0, "21", None, False, [3]])
def test_local_average_is_a_whole_number(size_px):
    with pytest.raises(ValueError, match=r"local_average_px=.* must be an odd whole number, or 0"):
        build("ResidualNet", {"local_average_px": size_px})


@pytest.mark.parametrize(
    ("make", "count", "parameters", "last"),
    [
        (resnet18, 122, 11_689_512, "layer4.1.bn2.num_batches_tracked"),
        (resnet34, 218, 21_797_672, "layer4.2.bn2.num_batches_tracked"),
        (resnet50, 320, 25_557_032, "layer4.2.bn3.num_batches_tracked"),
    ],
)
def test_resnets_have_torchvisions_state_dict(make, count, parameters, last):
    net = make(num_classes=1000)
    state = net.state_dict()
    assert len(state) == count  # counts and sizes as torchvision documents them
    assert sum(p.numel() for p in net.parameters()) == parameters
    assert {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer2.0.downsample.0.weight",
        "fc.bias",
        last,
    } <= set(state)


def test_a_file_alone_rebuilds_the_network(tmp_path):
    net = ResidualNet(widths=(4, 4, 6, 8, 8)).double().eval()
    average = torch.rand(3, 8, 8)
    path = tmp_path / "net.safetensors"
    save_model(
        path,
        net,
        architecture="ResidualNet",
        parameters={"widths": [4, 4, 6, 8, 8]},
        preprocessing={"size_px": 8, "average": average},
    )
    model = load_model(path)
    x = torch.rand(1, 3, 65, 65, dtype=torch.float64)
    assert torch.equal(model.net(x), net(x))
    assert not model.net.training
    assert model.preprocessing["size_px"] == 8
    assert torch.equal(model.preprocessing["average"], average)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["parameters"]) == {"widths": [4, 4, 6, 8, 8]}
    assert [p.name for p in tmp_path.iterdir()] == ["net.safetensors"]
    other = ResidualNet(widths=(4, 4, 6, 8, 8)).double()
    load_weights(other, path)
    assert torch.equal(other.eval()(x), net(x))


def test_own_networks_come_by_factory(tmp_path):
    net = resnet18(3)
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    with pytest.raises(ValueError, match="does not name its architecture; give --net"):
        load_model(tmp_path / "plain.safetensors")
    model = load_model(
        tmp_path / "plain.safetensors", architecture="tilestream.nets:resnet18", parameters={"num_classes": 3}
    )
    assert torch.equal(model.net.fc.weight, net.fc.weight)


def test_bad_files_are_told_in_a_line(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_model(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("no model")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_model(tmp_path / "text.safetensors")
    save_model(tmp_path / "net.safetensors", resnet18(3), architecture="resnet18", parameters={"num_classes": 2})
    with pytest.raises(ValueError, match=r"does not fit net='resnet18': size mismatch for fc\.weight"):
        load_model(tmp_path / "net.safetensors")


class Bomb:
    """What runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_refused_and_converted_without_being_run(tmp_path):
    net = resnet18(3)
    torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "old.pt")
    with pytest.raises(ValueError, match=r"is a pickle.*tilestream convert .*old.pt MODEL.safetensors --net NAME"):
        load_model(tmp_path / "old.pt")
    convert(tmp_path / "old.pt", tmp_path / "new.safetensors", "resnet18", {"num_classes": 3})
    model = load_model(tmp_path / "new.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(model.net.state_dict().values(), net.state_dict().values(), strict=True)
    )
    torch.save({"state_dict": net.state_dict(), "extra": Bomb(tmp_path / "run")}, tmp_path / "bomb.pt")
    torch.save(net, tmp_path / "whole.pt")
    (tmp_path / "text.pt").write_text("none")
    for name in ("bomb", "whole", "text"):
        with pytest.raises(ValueError, match="is no state dict of tensors alone"):
            convert(tmp_path / f"{name}.pt", tmp_path / "x.safetensors", "resnet18")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match=r"old.pt' does not fit net='resnet50'"):
        convert(tmp_path / "old.pt", tmp_path / "x.safetensors", "resnet50")
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(
    "name", ["resnet19", "save_model", "no.such.package:net", "tilestream.nets:nothing", "builtins:dict"]
)
def test_unknown_networks(name):
    with pytest.raises(ValueError, match=rf"net='{name}'"):
        build(name)
