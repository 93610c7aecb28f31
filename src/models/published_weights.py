"""Weights published by others: the table of them, and downloads by name or URL."""

import importlib.util
import os
import urllib.parse
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import yaml

from src.models.networks import NETWORKS, aliases
from src.models.weight_files import looks_like_weights
from src.utils.download import NotFound, checked_address, download, sha256_in_name
from src.utils.errors import UserError, suggestion
from src.utils.files import user_cache

_TABLE = Path(__file__).with_suffix(".yaml")
_HUB = "https://huggingface.co"
# A value that somebody who knows torchvision or timm types for --pretrained.
_YES = ("1", "true", "yes", "on")
_PYTORCH_ENDINGS = (".pth", ".pt", ".bin")
_WEIGHTS_ENDINGS = (*_PYTORCH_ENDINGS, ".safetensors")


@dataclass(frozen=True)
class PublishedWeights:
    """An entry of published_weights.yaml, whose head explains the attributes."""

    name: str
    network: str
    url: str
    licence: str
    megabytes: int
    top1: float
    crop_pct: float = 0.875
    interpolation: str = "bilinear"

    def __str__(self) -> str:
        return f"{self.name} ({self.megabytes} MB, {self.licence})"

    @property
    def timm_config(self) -> dict[str, object]:
        """The network and preprocessing as timm's config.json states them."""
        return {
            "architecture": self.network,
            "crop_pct": self.crop_pct,
            "interpolation": self.interpolation,
        }


def published_weights() -> dict[str, PublishedWeights]:
    """{name: PublishedWeights}, the preferred ones of each network first."""
    table = yaml.safe_load(_TABLE.read_text(encoding="utf-8"))
    return {name: PublishedWeights(name, **entry) for name, entry in table.items()}


def find_published(name: str) -> PublishedWeights | None:
    """The weights of this name, or the preferred ones of the network of this name; or None."""
    published = published_weights()
    network = aliases().get(name, name)
    return published.get(name) or next(
        (w for w in published.values() if w.network == network), None
    )


def local_weights(name: str) -> str:
    """The file that ``name`` stands for, whether or not it is there yet.

    Args:
        name: a file or folder; an address, or the name of published weights or their network.

    Returns:
        For an address or published weights their file in the user's cache, otherwise ``name``.
    """
    if os.path.exists(name):
        return name
    published = find_published(name)
    if published is None and not _is_address(name):
        return name
    cache = user_cache()
    if cache is None:
        raise UserError("there is no folder to download to: set HOME or XDG_CACHE_HOME")
    url = published.url if published else name
    # Files at different addresses may have the same name.
    folder = published.name if published else f"{zlib.crc32(url.encode()):08x}"
    return str(cache / "weights" / folder / os.path.basename(urllib.parse.urlsplit(url).path))


def fetch_weights(name: str) -> None:
    """Download what ``name`` stands for in ``local_weights``, unless it is there.

    $HF_ENDPOINT replaces https://huggingface.co, as in Hugging Face's own programs.

    Raises:
        UserError: if it cannot be downloaded, or ``name`` is none of those.
    """
    if not name or os.path.exists(name):
        return
    published = find_published(name)
    if published is None and not _is_address(name):
        raise UserError(_unknown(name))
    if published is None:
        checked_address(name)
    target = Path(local_weights(name))
    _check_readable(name, target)
    if published is None:
        _fetch_address(name, target)
    else:
        _fetch_published(published, target)


def place_for_output(path: Path) -> Path:
    """The path to derive the names of output files from.

    That is ``path`` itself, or for downloaded weights a file of their name in the current folder.
    """
    cache = user_cache()
    if cache is None or not path.is_relative_to(cache):
        return path
    published = published_at(path)
    return Path(f"{published.name}{path.suffix}" if published else path.name)


def published_at(path: Path) -> PublishedWeights | None:
    """The published weights that a file in the user's cache holds; None for another file."""
    cache = user_cache()
    if cache is None or path.parent.parent != cache / "weights":
        return None
    return published_weights().get(path.parent.name)


def published_as(name: str) -> PublishedWeights | None:
    """The published weights that ``name``, a file name, belongs to; None if there is not just one.

    A file has the name at the end of their URL, or their name here with an ending of weights.
    """
    stem, ending = os.path.splitext(name)
    found = [
        weights
        for weights in published_weights().values()
        if os.path.basename(weights.url) == name
        or (weights.name == stem and ending in _WEIGHTS_ENDINGS)
    ]
    return found[0] if len(found) == 1 else None


def _fetch_published(weights: PublishedWeights, target: Path) -> None:
    sha256 = sha256_in_name(weights.url)
    download(_mirrored(weights.url), target, sha256, str(weights), looks_like_weights)


def _fetch_address(url: str, target: Path) -> None:
    url = _mirrored(url)
    if "/resolve/" in url and not target.exists():
        # On Hugging Face the network and preprocessing are in a file next to the weights.
        with suppress(NotFound):
            folder = url.partition("?")[0].rpartition("/")[0]
            download(f"{folder}/config.json", target.with_name("config.json"))
    download(url, target, sha256_in_name(url), is_valid=looks_like_weights)


def _mirrored(url: str) -> str:
    mirror = os.environ.get("HF_ENDPOINT", "").strip() or _HUB
    if not mirror.startswith(("https://", "http://")):
        raise UserError(f"HF_ENDPOINT={mirror} must begin with https:// or http://")
    return mirror.rstrip("/") + url.removeprefix(_HUB) if url.startswith(_HUB) else url


def _is_address(name: str) -> bool:
    return "://" in name


def _check_readable(name: str, target: Path) -> None:
    """Raise UserError, before downloading, for a file that could not be read."""
    if not target.suffix:
        raise UserError(f"'{name}' is not the address of a file")
    if target.suffix in _PYTORCH_ENDINGS and importlib.util.find_spec("torch") is None:
        raise UserError(
            f"'{target.name}' is a PyTorch file and PyTorch is not installed: 'pip install torch', "
            "or take .safetensors"
        )


def _unknown(name: str) -> str:
    if name.lower() in _YES:
        return "name the weights, as in --pretrained=resnet18; --list shows them"
    network = aliases().get(name, name)
    if network in NETWORKS:
        return f"no published weights of {network} are known; pass --checkpoint_file_path=FILE"
    near = "" if "/" in name else suggestion(name, (*NETWORKS, *published_weights()))
    return f"checkpoint '{name}' does not exist{near}"
