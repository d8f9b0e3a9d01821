"""A trained model in one file: weights, with the configuration, what its task gives and the vocabulary in the header. It is
loaded without the data and without the store."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from . import checkpoints
from .codecs import Vocabulary
from .config import ConfigurationError, parse, plain
from .models import LanguageModel, Model
from .runconfig import RunConfig, build_model
from .tasks import Signal


@dataclass(frozen=True)
class Trained:
    """A model after `step` updates of the run of `config`. signal: what its task gives. vocabulary: of a text."""

    config: RunConfig
    step: int
    model: Model
    signal: Signal
    vocabulary: Vocabulary | None = None

    def save(self, path: Path | str) -> Path:
        """Writes the file that `load` reads."""
        header = {"config": plain(self.config), "step": self.step, "signal": plain(self.signal),
                  "vocabulary": self.vocabulary and self.vocabulary.to_json()}
        checkpoints.write(Path(path), self.model.state_dict(), header)
        return Path(path)

    @torch.no_grad()
    def predict(self, inputs: Tensor) -> Tensor:
        """What the model says of inputs as its task gives them, (B, ...), settled by the run's own solver: (B, ..., V)."""
        return self.model.predict(self.model.block.output(self.model.settle(inputs, self.config.solver).value))

    def generate(self, prompt: str, tokens: int = 200, temperature: float = 0.8, seed: int = 0, *,
                 top_k: int | None = None) -> str:
        """`prompt` and `tokens` more, drawn under the run's own solver; temperature and top_k as in `LanguageModel.generate`.

        Raises `data.DataError` for a character that the run never trained on, ValueError for a model of something else.
        """
        if self.vocabulary is None:
            raise ValueError(f"{self.config.name} was not trained on text, and only a text can be continued")
        if not hasattr(self.model, "generate"):
            raise ValueError(f"{type(self.model).__name__} has no method generate, as LanguageModel has; give it one, or draw "
                             "from what `predict` says")
        ids = cast(LanguageModel, self.model).generate(
            torch.tensor(self.vocabulary.encode(prompt)), tokens, self.config.solver, temperature,
            torch.Generator().manual_seed(seed), top_k=top_k)
        return self.vocabulary.decode(ids.tolist())


def load(path: Path | str, *, plugins: bool = False) -> Trained:
    """The trained model that `Run.export` wrote, or a run's weights as a store keeps them, on the CPU.

    plugins: whether modules that the file names are imported, and so run: those of classes that are not eplib's. Without it
    they are to be imported already. Raises FileNotFoundError, ValueError for a file that is damaged or another thing,
    `ConfigurationError` where the configuration names what is not there (a class of your own that cannot be imported).
    """
    weights, header = checkpoints.read(Path(path))
    if missing := {"config", "step", "signal", "vocabulary"} - header.keys():
        raise ValueError(f"{path} is no trained model: its header lacks {', '.join(sorted(missing))}; Run.export writes one")
    strange = {*_modules([header["config"], header["signal"]])} - sys.modules.keys()
    if strange and not plugins:
        raise ConfigurationError(f"{path} has classes of {', '.join(sorted(strange))}, which reading it would import, and so "
                                 "run: import that yourself first, or give plugins=True if you trust the file")
    config, signal = parse(RunConfig, header["config"], str(path)), parse(Signal, header["signal"], f"{path}, signal")
    model = build_model(config, signal)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"{path} holds the weights of another model than its header describes "
                         f"({str(error).splitlines()[-1].strip()}); have it written again") from error
    vocabulary = Vocabulary.from_json(header["vocabulary"]) if header["vocabulary"] else None
    return Trained(config, header["step"], model, signal, vocabulary)


def _modules(value: Any) -> Iterator[str]:
    """The modules that the kinds in a configuration's values name."""
    if isinstance(value, dict):
        if ":" in (kind := str(value.get("kind"))):
            yield kind.rpartition(":")[0]
        value = list(value.values())
    for one in value if isinstance(value, list) else ():
        yield from _modules(one)
