"""What every pretrained model keeps to, in one table over all names of torchvision."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torchvision
from torch.optim.swa_utils import AveragedModel
from torch.overrides import TorchFunctionMode
from torchvision.models import get_model, list_models

from cvdist import models
from cvdist.config import ModelConfig
from cvdist.errors import UserError
from cvdist.models import InputSpec, library
from cvdist.models.cutting import WithoutValues

NAMES = list_models(module=torchvision.models)
# One of each kind, which is run with numbers. VGG is in `test_vgg.py`, with a classifier of less memory.
NUMBERS = [
    *("convnext_tiny", "densenet121", "inception_v3", "mnasnet0_5", "mobilenet_v3_small", "resnet18"),
    *("squeezenet1_1", "swin_t", "vit_b_32"),
]
SIDES = {"inception_v3": 96}
# All kinds, which are cut in three places: other networks have more of the same blocks, or wider ones.
KINDS = [
    *(*NUMBERS, "alexnet", "efficientnet_b0", "efficientnet_v2_s", "googlenet", "maxvit_t", "mobilenet_v2"),
    *("regnet_x_400mf", "regnet_y_400mf", "resnet50", "resnext50_32x4d", "shufflenet_v2_x0_5", "swin_v2_t"),
    *("vgg11", "vgg11_bn", "vit_h_14"),
]


class Operations(TorchFunctionMode):
    """All operations in its context, with the shapes of what they return."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.seen.append((func, result.shape))
        return result


def operations(*modules, side):
    values = torch.zeros(2, 3, side, side, device="meta")
    with torch.no_grad(), WithoutValues(), Operations() as operations:
        for module in modules:
            values = module(values)
    return operations.seen


def settings(name, stages=0, **changes):
    return ModelConfig(**{"name": name, "head": "linear", "trainable_stages": stages, **changes})


def plain(name, side, **options):
    """torchvision's own network for 7 classes, without a second output."""
    if name.startswith("vit"):
        options["image_size"] = side
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    return get_model(name, num_classes=7, **options)


@pytest.mark.parametrize("name", NAMES)
def test_the_parts_do_what_the_whole_does_under_the_same_names(name):
    side, count = library.default_side(name), models.find(name).stages()
    with WithoutValues():
        own = plain(name, side).to("meta").eval()
    expected = {key: tensor.shape for key, tensor in own.state_dict().items()}
    for stages in (0, 1, count) if name in KINDS else (1,):
        model = models.skeleton(settings(name, stages), 7).to("meta").eval()
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == expected
        modules = models.frozen_and_trained(model)
        parts = [module for module in (modules.frozen, modules.trained) if module is not None]
        assert len(parts) == (1 if stages == count else 2)
        if stages == 1:
            assert operations(*parts, side=side) == operations(own, side=side)
        names = [set(part.state_dict()) for part in parts]
        assert set.union(*names) == expected.keys() and sum(map(len, names)) == len(expected)
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {key for key, _ in modules.trained.named_parameters()}
        assert f"{modules.head}.weight" in trained
        model.train()
        norms = [one for one in model.modules() if isinstance(one, torch.nn.modules.batchnorm._BatchNorm)]
        frozen = set(modules.frozen.modules()) if modules.frozen is not None else set()
        assert all(norm.training == (norm not in frozen) for norm in norms)


@pytest.mark.parametrize("name", NUMBERS)
def test_with_numbers(name):
    torch.manual_seed(0)
    side = SIDES.get(name, 64)
    images = torch.randn(3, 3, side, side)
    count = models.find(name).stages()
    input = InputSpec(3, side, side)
    model = models.build_model(settings(name, count, dropout=0.1), input, 7)
    torch.nn.init.normal_(model.get_submodule(model.last_layer).weight)  # which is 0 in a new ViT
    with WithoutValues():
        reference = plain(name, side)
    reference.load_state_dict(model.state_dict(), assign=True)
    with torch.no_grad():
        expected = reference.eval()(images)
        assert torch.equal(model.eval()(images), expected)
        for stages in (0, 1):
            modules = models.frozen_and_trained(divided(model, stages, name, input))
            assert torch.equal(modules.trained.eval()(modules.frozen(images)), expected)
    # Trained: deep copies share nothing, frozen layers keep what they are, an empty share takes part.
    model = divided(model, 0, name, input)
    modules = models.frozen_and_trained(model)
    average = AveragedModel(modules.trained)
    before = copy.deepcopy(modules.frozen.state_dict())
    modules.trained.train()
    features = modules.frozen(images)
    kept = features.clone()
    torch.nn.functional.cross_entropy(modules.trained(features), torch.zeros(3, dtype=torch.int64)).backward()
    assert torch.equal(features, kept)
    torch.optim.SGD(modules.trained.parameters(), 0.1).step()
    assert all(torch.equal(tensor, before[key]) for key, tensor in modules.frozen.state_dict().items())
    with torch.no_grad():
        assert torch.equal(models.with_trained(model, average.module).eval()(images), expected)
        assert not torch.equal(model.eval()(images), expected)
    assert modules.trained(modules.frozen(images[:0])).shape == (0, 7)


def test_compiles_without_a_graph_break_and_exports():
    torch.manual_seed(0)
    input, images = InputSpec(3, 32, 32), torch.randn(2, 3, 32, 32)
    model = models.build_model(settings("resnet18", 5), input, 7).eval()
    modules = models.frozen_and_trained(divided(model, 1, "resnet18", input))
    # The eager backend needs no C++ compiler; what fails here fails with any backend.
    frozen, trained = (
        torch.compile(one.eval(), backend="eager", fullgraph=True) for one in (modules.frozen, modules.trained)
    )
    torch.testing.assert_close(trained(frozen(images)), model(images))
    program = torch.export.export(model, (images,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.testing.assert_close(
        program.module()(images[:1].expand(5, -1, -1, -1)), model(images[:1].expand(5, -1, -1, -1))
    )


def divided(model, stages, name, input):
    """A model with the tensors of another one, of which fewer stages are trained."""
    other = models.skeleton(settings(name, stages), 7, input)
    other.load_state_dict(model.state_dict(), assign=True)
    modules = models.frozen_and_trained(other)
    modules.frozen.requires_grad_(False)
    modules.trained.requires_grad_(True)
    return other


@pytest.mark.parametrize(
    "name", ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050", "efficientnet_lite0"]
)
def test_networks_of_timm(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    input, images = InputSpec(3, 64, 64), torch.randn(2, 3, 64, 64)
    count = models.find(f"timm/{name}").stages()
    assert count == (13 if name.startswith("vit") else 4 if name.startswith("convnext") else 5)
    model = models.build_model(settings(f"timm/{name}", count), input, 7).eval()
    sized = {"img_size": 64} if name.startswith("vit") else {}
    own = timm.create_model(name, num_classes=7, **sized).eval()
    own.load_state_dict(model.state_dict())
    with torch.no_grad():
        expected = own(images)
        assert torch.equal(model(images), expected)
        for stages in (0, 1):
            modules = models.frozen_and_trained(divided(model, stages, f"timm/{name}", input))
            assert torch.equal(modules.trained.eval()(modules.frozen(images)), expected)
    needs = models.preprocessing(settings(f"timm/{name}", weights="DEFAULT"))
    assert needs.size == 224 and needs.resize.startswith("crop:")


def test_without_timm_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"^--model timm/\.\.\. needs timm: pip install cvdist\[timm\]$"):
        models.find("timm/resnet10t")
