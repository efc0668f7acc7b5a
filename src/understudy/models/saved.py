"""Is a saved model the one in memory? Load it as anybody would, and compare the log-probabilities of a few tokens."""

import copy
import logging
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .load import reason
from .sharding import whole_shape
from .weights import load_weights

logger = logging.getLogger(__name__)
_HALF = (torch.float16, torch.bfloat16)


class SavedModelDiffers(ValueError):
    """What would be loaded from a folder is another model than the one that was saved."""


@torch.no_grad()
def probe_log_probs(model: Any) -> Tensor:
    """Log-probabilities (2, 12, V) after fixed random tokens, float32 on the CPU, without dropout."""
    embeddings = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, whole_shape(embeddings)[0], (2, 12), generator=generator).to(embeddings.device)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    ids[ids == (-1 if pad is None else pad)] = 1  # padding is masked, and some families reset its row
    was_training = model.training
    model.eval()
    try:
        return model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1).cpu()
    finally:
        model.train(was_training)


def check_same(expected: Tensor, model: Any, what: str, rounding: bool) -> None:
    """Refuse a model whose log-probabilities differ from the expected ones by more than rounding.

    Args:
        what: the model in the error's sentence.
        rounding: were weights or activations rounded to 16 bits in one of the two and not in the other?

    Raises:
        SavedModelDiffers: with the KL divergence per token.
    """
    actual = probe_log_probs(model)
    if expected.shape != actual.shape:
        raise SavedModelDiffers(f"{what} has another vocabulary than the trained one")
    if not torch.isfinite(expected).all():
        return  # nothing can be said
    difference = float((expected.exp() * (expected - actual)).sum(-1).mean())
    if not abs(difference) <= (0.02 if rounding else 1e-4):
        raise SavedModelDiffers(
            f"{what} is another model than the trained one: its predictions differ by {difference:.3g} nats per token"
        )


def check_saved(folder: Path, expected: Tensor, model: Any, rounding: bool = False) -> None:
    """Load what `folder` holds, a model or adapters, as anybody would, and compare it with the model in memory.

    Adapters are loaded by transformers and by PEFT. Without the memory for a second model, a warning says so.

    Raises:
        SavedModelDiffers: naming the way in which it was loaded.
    """
    from transformers import AutoModelForCausalLM

    rounding = rounding or model.dtype in _HALF
    if not has_memory(model):
        logger.warning("there is no memory to load the saved student and compare it with the trained one")
        return
    auto = partial(AutoModelForCausalLM.from_pretrained, folder, dtype=model.dtype)
    try:
        if (folder / "adapter_config.json").is_file():
            loaded = load_weights(AutoModelForCausalLM, str(folder), dtype=model.dtype).to(model.device)
            check_same(expected, loaded, "the saved model, loaded with PEFT,", rounding)
            del loaded
            _check_by_transformers(expected, lambda: auto().to(model.device), rounding)
        else:
            check_same(expected, auto().to(model.device), "the saved model", rounding)
    except (torch.OutOfMemoryError, MemoryError):
        logger.warning("there is no memory to load the saved student and compare it with the trained one")
    except Exception as error:  # loading raises anything
        if isinstance(error, SavedModelDiffers):
            raise
        raise SavedModelDiffers(f"the saved model cannot be loaded ({reason(error)})") from error


def has_memory(model: nn.Module) -> bool:
    """Is there free memory for a second copy of this model? A process that takes more is killed without an error."""
    needed = sum(whole_shape(parameter).numel() * parameter.element_size() for parameter in model.parameters())
    return psutil.virtual_memory().available > 1.2 * needed


def _check_by_transformers(expected: Tensor, load: Callable[[], Any], rounding: bool) -> None:
    """Compare adapters as transformers loads them, without PEFT's classes; kinds that it refuses are only named."""
    try:
        loaded = load()
    except (ValueError, KeyError, NotImplementedError) as error:
        logger.warning("transformers cannot load these adapters by itself, only PEFT can: %s", reason(error))
        return
    check_same(expected, loaded, "the saved model, loaded with transformers,", rounding)


def check_adapters(base: nn.Module, model: Any) -> None:
    """Save a model's adapters with random weights, load them by PEFT and by transformers, and compare.

    It costs a few short forwards, and no memory for the weights below the adapters.

    Args:
        base: the model without adapters; it is not changed.
        model: the model with adapters, whose weights are the same afterwards.

    Raises:
        SavedModelDiffers: if the saved model would be another one.
    """
    from peft import PeftModel

    rounding = model.dtype in _HALF
    with torch.random.fork_rng([]), _random_weights(model), tempfile.TemporaryDirectory() as folder:
        expected = probe_log_probs(model)
        model.save_pretrained(folder)
        name_magnitudes(Path(folder))
        check_same(expected, PeftModel.from_pretrained(shared_copy(base), folder), "what would be saved", rounding)

        def by_transformers() -> Any:
            plain: Any = shared_copy(base)
            plain.load_adapter(folder)
            return plain

        _check_by_transformers(expected, by_transformers, rounding)


def check_merge(model: Any) -> None:
    """Merge a copy of a model's adapters with random weights, and compare; takes memory for the merged weights.

    Raises:
        SavedModelDiffers: if the merged model would be another one, or one that its configuration does not describe.
    """
    with _random_weights(model):
        expected = probe_log_probs(model)
        copied: Any = shared_copy(model)
        merged = copied.merge_and_unload(safe_merge=True)  # assigns new values, and leaves the shared ones
        check_same(expected, merged, "the merged model", model.dtype in _HALF)
    check_fits_config(merged)


def name_magnitudes(folder: Path) -> None:
    """Name DoRA's magnitudes in a folder of adapters so that transformers finds them too, as PEFT does."""
    path = folder / "adapter_model.safetensors"
    weights = load_file(path) if path.is_file() else {}
    if any(name.endswith("lora_magnitude_vector") for name in weights):
        renamed = {f"{n}.weight" if n.endswith("lora_magnitude_vector") else n: w for n, w in weights.items()}
        save_file(renamed, path, {"format": "pt"})


def check_fits_config(model: Any) -> None:
    """Refuse a model whose weights are not those that its configuration describes: it could not be loaded.

    Raises:
        SavedModelDiffers: with the name of a weight.
    """
    with torch.device("meta"):
        described = type(model)._from_config(copy.deepcopy(model.config)).state_dict()
    weights = model.state_dict()
    names = sorted(described.keys() | weights.keys())
    shape = {name: [part[name].shape if name in part else None for part in (described, weights)] for name in names}
    different = [name for name, (one, other) in shape.items() if one != other]
    if different:
        raise SavedModelDiffers(
            f"the merged model has weights that its configuration does not describe: {different[0]}"
        )


def shared_copy(model: nn.Module, own_buffers: bool = False) -> Any:
    """A copy of a model's modules with parameters of its own that share the memory of the model's weights.

    What is tied stays tied. Buffers are the model's, unless the copy is to have its own.
    """
    memo: dict[int, Any] = {} if own_buffers else {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.data, requires_grad=False)
    return copy.deepcopy(model, memo)


def samples(tensors: Iterable[Tensor], count: int = 1024) -> list[Tensor]:
    """About `count` numbers of each tensor, to see whether it changed."""
    return [t.detach().flatten()[:: max(1, t.numel() // count)].clone() for t in tensors]


@contextmanager
def _random_weights(model: nn.Module) -> Iterator[None]:
    """Within this block, noise is added to the trainable parameters: new adapters change nothing."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [parameter.detach().clone() for parameter in trainable]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trainable:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            parameter.add_(0.1 * noise.to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trainable, values, strict=True):
                parameter.copy_(value)
