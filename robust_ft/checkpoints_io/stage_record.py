"""`<stage>/model.json`: a stage's model and what it started from, for those who load the stage."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from robust_ft.checkpoints_io import adapters, families, native, orbax_params
from robust_ft.checkpoints_io.tokens import Tokens, located
from robust_ft.errors import UserError
from robust_ft.files import read_json_object, write_json
from robust_ft.models.config import ModelConfig
from robust_ft.models.model import Model
from robust_ft.models.peft import Peft
from robust_ft.vocabulary import Vocabulary

# The file of a stage, and the one of its run.
FILE, RUN = "model.json", "run.json"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class StageRecord:
    """A stage's model, and where its parameters came from.

    Attributes:
        config: The model's config.
        methods: Its PEFT methods, as exported.
        tokens: Its token ids and its vocabulary.
        restored_from: `Stage.restore`, with whole paths.
        seed: The recipe's.
    """

    config: ModelConfig
    methods: tuple[Peft, ...]
    tokens: Tokens
    restored_from: str
    seed: int

    @classmethod
    def of(
        cls, model: Model, vocabulary: Vocabulary, restored_from: Sequence[str], seed: int
    ) -> "StageRecord":
        methods = model.exported().peft
        restored = ",".join(map(located, restored_from))
        return cls(model.config, methods, Tokens.of(model, vocabulary), restored, seed)

    @classmethod
    def read(cls, stage: Path) -> "StageRecord | None":
        """Returns the record in a stage's folder, None if there is none.

        Raises:
            UserError: It is broken, or has a model or method that is not one of ours.
        """
        file = stage / FILE
        fields = read_json_object(file, default={})
        if not fields:
            return None
        try:
            if fields["version"] > VERSION:
                raise UserError(f"'{file}' was written by a newer robust_ft.")
            config = native.read_config(
                families.get(fields["family"]).CONFIG, fields["config"], file
            )
            methods = tuple(
                adapters.method(entry["method"], entry["settings"], file)
                for entry in fields["methods"]
            )
            tokens = Tokens.read(fields["tokens"], file)
            if tokens is None:
                raise TypeError
            return cls(config, methods, tokens, str(fields["restored_from"]), int(fields["seed"]))
        except (KeyError, TypeError):
            raise UserError(
                f"'{file}' lacks version, family, config, methods, tokens, restored_from or seed."
            ) from None

    def write(self, stage: Path) -> None:
        """Writes it into the stage's folder."""
        fields = {
            "version": VERSION,
            "family": families.name_of(self.config),
            "config": dataclasses.asdict(self.config),
            "methods": adapters.described(self.methods),
            "tokens": dataclasses.asdict(self.tokens),
            "restored_from": self.restored_from,
            "seed": self.seed,
        }
        # Methods of users' own may have settings that JSON does not know; they can't be read back.
        plain: Any = json.loads(json.dumps(fields, default=str))
        write_json(stage / FILE, plain)

    @property
    def model(self) -> Model:
        """The model with its methods as exported."""
        return dataclasses.replace(native.with_ids(self.config, self.tokens.ids), peft=self.methods)


def of_checkpoint(path: Path) -> StageRecord | None:
    """Returns the record of the stage that a `checkpoint_<step>` is of, None of all else."""
    is_checkpoint = orbax_params.is_directory(path)
    return StageRecord.read(path.absolute().parent) if is_checkpoint else None


def is_run(folder: Path) -> bool:
    """Returns whether a folder is a run's MODEL_DIR."""
    return (folder / RUN).is_file()
