"""Networks that take uint8 images, normalise inside and return (logits, embedding), and their bundles on disk."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from cbd.bundle import CARD, WEIGHTS, BundleCard, check_weights, read_card
from cbd.errors import DataError
from cbd.files import sha256_file, write_json


class Normalise(nn.Module):
    """uint8 images [N, 3, H, W] to floats of about zero mean and unit spread, by fixed constants that no data set can move."""

    def forward(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).sub_(127.5).div_(64.0)


class PreActBlock(nn.Module):
    """Batch norm, ReLU, 3x3 convolution, twice, around a shortcut (He et al., ECCV 2016)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False) if channels_in != channels_out else None

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(active)
        out: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active))))
        return out + shortcut


class WideResNet(nn.Module):
    """WRN-16-k (Zagoruyko and Komodakis, BMVC 2016): three groups of two blocks, widths 16k, 32k and 64k."""

    def __init__(self, num_classes: int, widen: int = 1) -> None:
        super().__init__()
        widths = [16, 16 * widen, 32 * widen, 64 * widen]
        self.normalise = Normalise()
        self.stem = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        blocks = []
        for channels_in, channels_out, stride in zip(widths, widths[1:], (1, 2, 2), strict=False):
            blocks += [PreActBlock(channels_in, channels_out, stride), PreActBlock(channels_out, channels_out, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(widths[-1])
        self.embedding_size = widths[-1]
        self.head = nn.Linear(widths[-1], num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.normalise(images).contiguous(memory_format=torch.channels_last)
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        embedding = x.mean((2, 3))
        return self.head(embedding), embedding


class ResNet(nn.Module):
    """torchvision's ResNet-18 or ResNet-34 (He et al., CVPR 2016), with a 3x3 stem and no first pooling below 64 pixels."""

    def __init__(self, architecture: str, num_classes: int, image_size: int) -> None:
        super().__init__()
        from torchvision import models  # its import costs seconds, so only where these networks are asked for

        self.normalise = Normalise()
        self.body = {"resnet18": models.resnet18, "resnet34": models.resnet34}[architecture](num_classes=num_classes)
        if image_size < 64:
            self.body.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
            self.body.maxpool = nn.Identity()
        self.embedding_size = 512
        self.head = self.body.fc
        self.body.fc = nn.Identity()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        embedding = self.body(self.normalise(images).contiguous(memory_format=torch.channels_last))
        return self.head(embedding), embedding


Network = WideResNet | ResNet


def make_model(architecture: str, *, num_classes: int, image_size: int, generator: torch.Generator) -> Network:
    """A freshly initialised network in channels_last; every random number comes from `generator`.

    The network maps images: uint8 [N, 3, image_size, image_size] to (logits: float [N, num_classes], embedding: float [N, embedding_size]).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator)))
        model: Network = WideResNet(num_classes) if architecture == "wrn-16-1" else ResNet(architecture, num_classes, image_size)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu", generator=generator)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def save_bundle(model: Network, card: BundleCard, bundle: Path) -> BundleCard:
    """Writes weights and card into the folder `bundle`; returns the card with the weights' digest filled in."""
    bundle.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, bundle / WEIGHTS)
    card = card.model_copy(update={"weights_sha256": sha256_file(bundle / WEIGHTS)})
    write_json(bundle / CARD, card.model_dump(mode="json"))
    return card


def load_model(bundle: Path) -> tuple[Network, BundleCard]:
    """The network of a bundle in evaluation mode and its card.

    Raises:
        DataError: no bundle, altered weights, or weights that do not fit the architecture.
    """
    card = read_card(bundle)
    check_weights(bundle)
    model = make_model(card.architecture, num_classes=len(card.class_names), image_size=card.image_size, generator=torch.Generator())
    try:
        model.load_state_dict(load_file(bundle / WEIGHTS))
    except Exception as error:  # safetensors and torch raise their own and plain RuntimeErrors for a header or shape they refuse
        raise DataError(f"{bundle / WEIGHTS}: not the weights of a {card.architecture}: {str(error).splitlines()[0]}") from None
    return model.eval(), card
