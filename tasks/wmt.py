"""Translation from English with ProMoT's template: WMT14 to French, WMT16 to German and Romanian.

  task          train        validation              test
  wmt14_enfr    15,786,979   newstest2013, 3,000     newstest2014, 3,003
  wmt16_ende     4,548,885   newstest2015, 2,169     newstest2016, 2,999
  wmt16_enro       610,320   newsdev2016, 1,999      newstest2016, 1,999

Read from `$ROBUST_FT_DATA_DIR/wmt_newstest` where its two files (`newstest2014.eng-fra.eng`,
`newstest2014.eng-fra.fra`, ...) are, else TFDS's `wmt14_translate` and `wmt16_translate` 1.0.0.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from robust_ft import metrics
from robust_ft.data.raw_files import aligned, text
from robust_ft.data.seqio_tasks import Files, Origin, Tfds, add
from robust_ft.metrics import postprocess
from tasks import templates


def _example(code: str, language: str) -> Callable[[dict[str, Any]], Mapping[str, str]]:
    return lambda record: {
        "inputs": templates.translation("English", language, text(record, "en")),
        "targets": text(record, code),
    }


def _add(
    task: str, dataset: str, code: str, language: str, files: str, sets: dict[str, str]
) -> None:
    def origins(split: str) -> list[Origin]:
        tfds = Tfds(f"{dataset}/{code}-en:1.0.0", split)
        if split not in sets:
            return [tfds]
        paths = tuple(f"wmt_newstest/{sets[split]}.eng-{files}.{part}" for part in ("eng", files))
        return [Files(paths, functools.partial(aligned, columns=("en", code))), tfds]

    splits = {split: origins(split) for split in ("train", "validation", "test")}
    add(
        task,
        {**splits, "reported": splits["test"]},
        _example(code, language),
        metric_fns=[metrics.bleu],
        postprocess_fn=postprocess.promot,
    )


_FR = {"validation": "newstest2013", "test": "newstest2014"}
_DE = {"validation": "newstest2015", "test": "newstest2016"}
_RO = {"validation": "newsdev2016", "test": "newstest2016"}
_add("wmt14_enfr", "wmt14_translate", "fr", "French", "fra", _FR)
_add("wmt16_ende", "wmt16_translate", "de", "German", "deu", _DE)
_add("wmt16_enro", "wmt16_translate", "ro", "Romanian", "ron", _RO)
