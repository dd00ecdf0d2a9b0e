"""Networks by name: ``zoo:``, ``torchvision:``, ``timm:``, a file's or a package's factory, or a module as it is."""

import contextlib
import copy
import difflib
import importlib
import importlib.util
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from zsq import zoo
from zsq.compat import import_timm, import_torchvision
from zsq.core.errors import CheckpointError, MissingExtra, RecipeError, UnsupportedModel

__all__ = ["Network", "check_network", "load_network", "read_checkpoint"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_FORMS = "zoo:NAME, torchvision:NAME, timm:NAME, path/to/file.py:factory, package.module:factory"


@dataclass(frozen=True)
class Network:
    """A network in eval mode and what it expects: images (N, C, H, W), in 0..1 before ``(x - mean) / std``."""

    module: nn.Module
    name: str
    input_shape: tuple[int, int, int]
    """(C, H, W)."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    classes: int
    """K, of the logits (N, K)."""


@dataclass(frozen=True)
class _Found:
    """What a source knows of a network before anybody overrides it."""

    module: nn.Module
    name: str
    input_shape: tuple[int, int, int] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    rename: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict
    """From the key names of another library's checkpoints."""


def load_network(
    model: str | nn.Module,
    *,
    checkpoint: str | Path | None = None,
    input_shape: tuple[int, int, int] | None = None,
    mean: Iterable[float] | None = None,
    std: Iterable[float] | None = None,
    pretrained: bool = True,
) -> Network:
    """The network that ``model`` names, with its weights, in eval mode, checked by ``check_network``.

    ``model`` is ``zoo:NAME``, ``torchvision:NAME``, ``timm:NAME``, ``path/to/file.py:factory``,
    ``package.module:factory``, or a module, which is copied. A ``checkpoint`` (``.safetensors``, or a torch file
    that holds only tensors) replaces the weights, and nothing is downloaded. Shape, mean and std are the source's
    own; for a factory or a module ``input_shape`` (C, H, W) must be given, and ``mean`` and ``std`` are ImageNet's
    for three channels, 0 and 1 otherwise. ``pretrained=False`` leaves a source's network at its random start.

    Raises:
        UnsupportedModel: if there is no such network, its code fails, or it does not pass ``check_network``.
        CheckpointError: if the weights do not fit, are not finite, or are no tensors.
        MissingExtra: if torchvision or timm is not installed, or their weights cannot be downloaded.
        RecipeError: if ``input_shape``, ``mean`` or ``std`` is missing or makes no sense.
    """
    if checkpoint is not None:
        state = read_checkpoint(checkpoint)  # first, so that a wrong path costs no download or build
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(0)  # a network without trained weights starts the same each time
        warnings.filterwarnings("ignore", "The default weight initialization of", FutureWarning)
        found = _find(model, pretrained=pretrained and checkpoint is None)
    if checkpoint is not None:
        _load_state(found, state, Path(checkpoint))
    module = found.module.eval()
    shape = input_shape or found.input_shape
    if shape is None:
        raise RecipeError(f"the input shape of {found.name} is not known: give input_shape, --input-shape C,H,W")
    shape = _checked_shape(shape)
    default = (IMAGENET_MEAN, IMAGENET_STD) if shape[0] == 3 else ((0.0,) * shape[0], (1.0,) * shape[0])
    with torch.random.fork_rng(devices=[]):
        classes = _logits(found.name, module, _noise(module, 1, shape)).shape[1]
    network = Network(
        module=module,
        name=found.name,
        input_shape=shape,
        mean=tuple(map(float, mean)) if mean is not None else found.mean or default[0],
        std=tuple(map(float, std)) if std is not None else found.std or default[1],
        classes=classes,
    )
    check_network(network)
    return network


def check_network(network: Network) -> None:
    """Returns if the network can be quantized at all: finite weights, and logits (N, K) that depend on nothing else.

    Raises:
        CheckpointError: if a parameter or buffer has NaN or infinite values.
        UnsupportedModel: if the network is not in eval mode, does not run on one and on two images of its input
            shape, returns anything but ``classes`` finite logits for each, or returns others the second time.
        RecipeError: if ``input_shape``, ``mean`` or ``std`` makes no sense.
    """
    module, name = network.module, network.name
    channels = _checked_shape(network.input_shape)[0]
    if not len(network.mean) == len(network.std) == channels or min(network.std) <= 0:
        raise RecipeError(
            f"mean {network.mean} and std {network.std}: {name} takes {channels} channels, so give {channels} "
            "numbers each, std above 0"
        )
    for path, part in module.named_modules():
        if part.training:
            raise UnsupportedModel(f"{path or name} is in training mode: call .eval() on the network first")
    x = _noise(module, 2, network.input_shape)
    with torch.random.fork_rng(devices=[]):  # a network that draws in eval mode draws something else each time
        one, two, again = (_logits(name, module, images) for images in (x[:1], x, x))  # a lazy layer starts here
    # What a checkpoint holds: an infinite mask that the code makes is no damage.
    for key, value in module.state_dict().items():
        if isinstance(value, Tensor) and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise CheckpointError(f"{key} of {name} has NaN or infinite values ({bad} of {value.numel()})")
    for images, logits in ((1, one), (2, two)):
        if logits.shape != (images, network.classes):
            expected = (images, network.classes)
            raise UnsupportedModel(f"{name} returns {tuple(logits.shape)} for {images} images, expected {expected}")
    if not torch.isfinite(two).all():
        raise UnsupportedModel(f"{name} returns NaN or infinite logits for random images {tuple(x.shape)}")
    if not torch.equal(two, again):
        raise UnsupportedModel(f"{name} changes its output in eval mode: two calls on the same images differ")


def read_checkpoint(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a ``.safetensors`` or torch file by name, without running any code from it.

    Takes what lies under ``state_dict`` or ``model`` where there is such a key, and drops a ``module.`` that all
    names begin with (left by ``DataParallel``).

    Raises:
        CheckpointError: if the file is missing, damaged, or holds anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}")
    try:
        if path.suffix == ".safetensors":
            state: Any = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle can raise anything
        code = re.search(r"(?:Unsupported (?:global|class|operand)|GLOBAL)\W+(?:GLOBAL )?([\w.]+)", str(error))
        reason = f"it holds {code[1]}, which could run code" if code else "it is damaged or of another kind"
        raise CheckpointError(
            f"{path} is not a file of tensors ({reason}): save model.state_dict() with safetensors or torch.save"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise CheckpointError(f"{path} holds one {type(state).__name__}, not tensors by name")
    if other := [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]:
        raise CheckpointError(f"{path} holds more than tensors by name: {_few(other)}; save model.state_dict()")
    if not state:
        raise CheckpointError(f"{path} holds no tensors")
    prefix = "module." if all(key.startswith("module.") for key in state) else ""
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _load_state(found: _Found, state: Mapping[str, Tensor], path: Path) -> None:
    """Load ``state`` into the found module, where every name and shape must fit."""
    state = found.rename(state)
    own = found.module.state_dict()
    wrong = [
        f"{key} is {tuple(value.shape)}, not {tuple(own[key].shape)}"
        for key, value in state.items()
        if isinstance(own.get(key), Tensor) and own[key].shape != value.shape
    ]
    problems = [f"{len(wrong)} of another shape ({_few(wrong)})"] if wrong else []
    if not wrong:
        result = found.module.load_state_dict(state, strict=False)
        for keys, what in ((result.missing_keys, "missing"), (result.unexpected_keys, "unexpected")):
            if keys:
                problems.append(f"{len(keys)} {what} ({_few(keys)})")
    if problems:
        raise CheckpointError(f"{path} does not fit {found.name}: {'; '.join(problems)}")


def _find(model: str | nn.Module, *, pretrained: bool) -> _Found:
    if isinstance(model, nn.Module):
        return _Found(copy.deepcopy(model), type(model).__name__)
    source, _, name = model.partition(":")
    match source:
        case "zoo":
            return _from_zoo(name, pretrained=pretrained)
        case "torchvision":
            return _from_torchvision(name, pretrained=pretrained)
        case "timm":
            return _from_timm(name, pretrained=pretrained)
    place, _, factory = model.rpartition(":")
    if not place or not factory:
        raise UnsupportedModel(f"no network {model!r}: the forms are {_FORMS}")
    if place.endswith(".py"):
        return _Found(_from_file(Path(place), factory), factory)
    return _Found(_from_package(place, factory), factory)


def _from_zoo(name: str, *, pretrained: bool) -> _Found:
    entry = zoo.entry(name)
    module = zoo.load_weights(name) if pretrained else entry.build()
    return _Found(module, name, entry.input_shape, entry.mean, entry.std, entry.rename)


def _from_torchvision(name: str, *, pretrained: bool) -> _Found:
    models = import_torchvision().models
    _check_name("torchvision", name, models.list_models(module=models))
    weights = models.get_model_weights(name).DEFAULT
    with _downloading(f"torchvision:{name}"):
        module = models.get_model(name, weights=weights if pretrained else None)
    if hasattr(module, "transform_input"):
        module.transform_input = True  # torchvision's weights expect it; without them it would be off
    preset = weights.transforms()
    size = int(preset.crop_size[0])
    return _Found(module, name, (3, size, size), tuple(preset.mean), tuple(preset.std))


def _from_timm(name: str, *, pretrained: bool) -> _Found:
    timm = import_timm()
    _check_name("timm", name, timm.list_models(), known=timm.is_model(name))
    with _downloading(f"timm:{name}"):
        try:
            module = timm.create_model(name, pretrained=pretrained)
        except RuntimeError as error:  # no weights of this name, in timm's words
            raise UnsupportedModel(f"timm:{name}: {_line(error)}") from error
    config = timm.data.resolve_model_data_config(module)
    channels, height, width = config["input_size"]
    return _Found(module, name, (channels, height, width), tuple(config["mean"]), tuple(config["std"]))


def _check_name(source: str, name: str, names: list[str], known: bool | None = None) -> None:
    if known is None:
        known = name in names
    if not known:
        close = difflib.get_close_matches(name, names, n=5)
        hint = f"close matches are {', '.join(close)}" if close else f"it has {len(names)}, such as {_few(names)}"
        raise UnsupportedModel(f"{source} has no network {name!r}: {hint}")


@contextlib.contextmanager
def _downloading(model: str) -> Iterator[None]:
    """Whatever a download raises, as one ``MissingExtra``."""
    try:
        yield
    except OSError as error:  # URLError, HTTPError, timeouts and the hub's errors are all of these
        raise MissingExtra(
            f"could not download {model} ({_line(error)}): "
            "give --checkpoint FILE, or run where the network is reachable"
        ) from error


def _from_file(file: Path, factory: str) -> nn.Module:
    if not file.is_file():
        raise UnsupportedModel(f"no file {file} with a network factory")
    spec = importlib.util.spec_from_file_location(f"_zsq_user_{file.stem}", file.resolve())
    if spec is None or spec.loader is None:
        raise UnsupportedModel(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    with _importing_from(file.resolve().parent), _user_code(str(file)):
        sys.modules[spec.name] = module  # dataclasses and pickle look the module up
        spec.loader.exec_module(module)
        return _made(vars(module), factory, str(file))


def _from_package(place: str, factory: str) -> nn.Module:
    with _importing_from(Path.cwd()), _user_code(place):
        try:
            module = importlib.import_module(place)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{place}.".startswith(f"{error.name}."):
                raise UnsupportedModel(f"no module {error.name!r}: the forms are {_FORMS}") from error
            raise
        return _made(vars(module), factory, place)


def _made(names: Mapping[str, Any], factory: str, place: str) -> nn.Module:
    """What the factory of this name makes; a module of this name is taken as it is."""
    if factory not in names:
        public = [name for name, value in names.items() if callable(value) and not name.startswith("_")]
        close = difflib.get_close_matches(factory, public) or public
        raise UnsupportedModel(f"{place} has no {factory!r}: it has {_few(close)}")
    made = names[factory]
    if not isinstance(made, nn.Module) and callable(made):
        made = made()
    if not isinstance(made, nn.Module):
        raise UnsupportedModel(f"{factory} in {place} gives a {type(made).__name__}, not a torch.nn.Module")
    return made


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """The folder is the first place of ``import`` for a while."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


@contextlib.contextmanager
def _user_code(place: str) -> Iterator[None]:
    """Whatever the user's code raises, as one line with its last file and line outside of the libraries."""
    try:
        yield
    except (UnsupportedModel, MissingExtra):
        raise
    except (Exception, SystemExit) as error:
        here = [(f.filename, f.lineno) for f in traceback.extract_tb(error.__traceback__) if _is_users(f.filename)]
        file, line = (error.filename, error.lineno) if isinstance(error, SyntaxError) else (here or [(place, None)])[-1]
        where = f"{file}:{line}" if line else file
        raise UnsupportedModel(f"{where}: {type(error).__name__}: {_line(error)}") from error


def _is_users(file: str) -> bool:
    return file != __file__ and not file.startswith("<") and "site-packages" not in file and "/lib/python" not in file


def _checked_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise RecipeError(f"input_shape is {tuple(shape)}: it must be (C, H, W), three numbers above 0")
    return shape[0], shape[1], shape[2]


def _noise(module: nn.Module, images: int, shape: tuple[int, int, int]) -> Tensor:
    """The same random images (N, C, H, W) each time, where the network is."""
    x = torch.randn(images, *shape, generator=torch.Generator().manual_seed(0))
    weights = next(iter(module.parameters()), None)
    return x if weights is None else x.to(weights.device)


def _logits(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """The network's logits (N, K)."""
    try:
        with torch.no_grad():
            logits = module(x)
    except Exception as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        raise UnsupportedModel(f"{name} does not run on images {tuple(x.shape)}: {reason}") from error
    if not isinstance(logits, Tensor):
        raise UnsupportedModel(f"{name} returns a {type(logits).__name__}: it must return logits (N, K), one tensor")
    if logits.ndim != 2:
        raise UnsupportedModel(f"{name} returns a tensor {tuple(logits.shape)}: it must return logits (N, K)")
    return logits


def _line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _few(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
