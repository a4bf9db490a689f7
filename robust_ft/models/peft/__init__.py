"""Parameter-efficient finetuning: one file a method, plugged into the models' hook sites."""

from robust_ft.models.peft.adapter import Adapter
from robust_ft.models.peft.base import Peft
from robust_ft.models.peft.ia3 import IA3
from robust_ft.models.peft.lora import Lora
from robust_ft.models.peft.oplora import OPLora
from robust_ft.models.peft.prefix import Prefix
from robust_ft.models.peft.prompt import Prompt

__all__ = ["IA3", "METHODS", "Adapter", "Lora", "OPLora", "Peft", "Prefix", "Prompt"]

# All methods, by what configs call them (`Model.prompt = @Prompt()`). A new one goes last: random
# keys and the order of prefixes depend on the order in which they are plugged in.
METHODS: dict[str, type[Peft]] = {
    "prompt": Prompt,
    "prefix": Prefix,
    "adapter": Adapter,
    "lora": Lora,
    "ia3": IA3,
    "oplora": OPLora,
}
