"""Load a policy's weights into memory, and check that they are those of its files.

If the files lack a tensor, transformers fills it with random numbers and warns. Here every tensor
is checked: none is missing, unexpected or of another shape, each has the values of its file, and
every value is finite. An adapter is merged into its base, whose other tensors stay as they are.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GenerationConfig
from xxhash import xxh3_128

from grpo_harness.engines.adapters import merge
from grpo_harness.policy.checkpoint import Checkpoint, PolicyError, weight_files
from grpo_harness.policy.policy import Policy, quiet, source_of
from grpo_harness.text import one_line

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def device_of(name: str) -> torch.device:
    """Return the device; ``auto`` is CUDA or else the CPU. Raises ``PolicyError`` without it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise PolicyError(
            f"no device {name!r} on this machine ({one_line(error)}): name cpu, cuda or auto"
        ) from error
    return device


def dtype_of(name: str, device: torch.device) -> torch.dtype:
    """Return the number format: ``auto`` is bfloat16 where CUDA supports it, else float16.

    On the CPU it is float32. Raises ``PolicyError`` for an unknown name.
    """
    if name == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if name not in _DTYPES:
        raise PolicyError(f"no dtype {name!r}: it is auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def load_weights(policy: Policy, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """Return the policy's model on ``device`` with its weights as ``dtype``, ready to sample from.

    Its own generation config is emptied, so that it cannot affect sampling. Raises ``PolicyError``
    with the tensor that is missing, unexpected, of another shape, different from its file, or not
    finite.
    """
    whole = policy.checkpoint.whole
    source = source_of(whole)
    if not whole.gguf_file:
        source["use_safetensors"] = True
    try:
        with quiet():
            loading: Any = AutoModelForCausalLM.from_pretrained(
                whole.path,
                dtype=dtype,
                output_loading_info=True,
                # So that a wrong shape is reported below, in one line and not in a long table.
                ignore_mismatched_sizes=True,
                **source,
            )
    except (torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:  # transformers raises whatever its readers raise
        raise PolicyError(
            f"{policy.checkpoint} cannot be loaded from {whole.path}: "
            f"{one_line(error)}; get the checkpoint again, or name another"
        ) from error
    model, info = loading
    _all_there(whole, info)
    _the_files_own(whole, model)
    if policy.checkpoint.base:
        model, changed = merge(policy.checkpoint, model)
        _the_files_own(whole, model, changed)
    _all_finite(policy.checkpoint, model)
    model.generation_config = GenerationConfig()
    model.eval().requires_grad_(False)
    loaded: PreTrainedModel = model.to(device)
    return loaded


def check_loaded(policy: Policy, model: PreTrainedModel) -> None:
    """Require that a model that was loaded elsewhere has the tensors of the policy's files.

    Raises ``PolicyError`` with the tensor that is missing, different from its file, or not finite.
    """
    whole = policy.checkpoint.whole
    stored: set[str] = set()
    for path in weight_files(whole):
        with safe_open(path, framework="pt") as file:
            stored |= set(file.keys())
    held = dict(_tensors(model, tied=True))
    if stored <= held.keys():  # of some architectures they are renamed while they are read
        there = {id(held[name]) for name in stored}
        missing = {name for name, tensor in _tensors(model) if id(tensor) not in there}
        _all_there(whole, {"missing_keys": missing, "mismatched_keys": (), "unexpected_keys": ()})
    _the_files_own(whole, model)
    _all_finite(policy.checkpoint, model)


def loaded_digest(model: PreTrainedModel) -> str:
    """Return a digest of the weights in memory, tensor by tensor (XXH3, 128 bits).

    Two policies with the same digest draw the same completions, whatever their files are.
    """
    digest = xxh3_128()
    for name, tensor in _tensors(model):
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def first_not_finite(model: PreTrainedModel, tokens: torch.Tensor) -> str:
    """Name the first module whose output is not finite for ``tokens``, shape (1, tokens)."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(_module: Any, _given: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if isinstance(values, torch.Tensor) and not bool(values.isfinite().all()):
                found.append(name)

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        with torch.inference_mode():
            model(tokens.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "the logits"


def _all_there(checkpoint: Checkpoint, info: dict[str, Any]) -> None:
    # Each tensor of the model is in the files, or tied to one that is; and vice versa.
    for what, names in (
        ("lack the tensor", info["missing_keys"]),
        ("have another shape of the tensor", {name for name, *_ in info["mismatched_keys"]}),
        ("have, in addition to the model's, the tensor", info["unexpected_keys"]),
    ):
        if names:
            first, *others = sorted(names)
            more = f" (and {len(others)} more)" if others else ""
            raise PolicyError(
                f"{checkpoint}: the files in {checkpoint.path} {what} "
                f"{first}{more}; get the checkpoint again, or save it whole"
            )


def _all_finite(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    for name, tensor in _tensors(model):
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise PolicyError(
                f"{checkpoint}: the tensor {name} in {checkpoint.path} holds NaN or infinity (read "
                f"as {str(tensor.dtype).removeprefix('torch.')}); get the checkpoint again, or "
                "name another"
            )


def _the_files_own(
    checkpoint: Checkpoint, model: PreTrainedModel, changed: Collection[str] = ()
) -> None:
    """Compare the tensors in memory, but the ``changed`` ones, with those in the files."""
    if checkpoint.gguf_file:  # its tensors have other names, and are quantized
        return
    held = {n: t for n, t in _tensors(model, tied=True) if n not in changed}
    for path in weight_files(checkpoint):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if (tensor := held.get(name)) is None or not tensor.is_floating_point():
                    continue
                stored = file.get_tensor(name)
                if stored.shape != tensor.shape or not stored.is_floating_point():
                    continue
                # NaN is reported by load_weights; here it would differ from itself.
                right = stored.to(tensor.device, tensor.dtype)
                if not torch.equal(right.nan_to_num(), tensor.nan_to_num()):
                    raise PolicyError(
                        f"{checkpoint}: the weights in memory are not those of its files: "
                        f"{name} has other values than in {path}. Another policy was loaded "
                        "instead"
                    )


def _tensors(model: PreTrainedModel, tied: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the model's parameters and saved buffers by name, in the order of the names."""
    names = set(model.state_dict())
    parameters = model.named_parameters(remove_duplicate=not tied)
    buffers = ((name, b) for name, b in model.named_buffers() if name in names)
    yield from sorted([*parameters, *buffers], key=lambda entry: entry[0])
