"""Makes what `rpg.words.sentences` loads: an adapter to a sentence encoder, and the head on it.

    python -m rpg.words.make models/cifar10-words --encoder all-MiniLM-L6-v2/ --seed 0

It takes about fifteen minutes of one CPU core. Equal seeds give equal files on one kind of processor.
"""

import argparse
import sys
from pathlib import Path

from rpg.errors import RPGError
from rpg.storage.files import sha256, write_text
from rpg.text_encoder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TextEncoder
from rpg.words.fitting import FitSettings, fit
from rpg.words.head import HEAD_FILE, ClassHead
from rpg.words.measuring import calibrated, described, measure
from rpg.words.properties import Part

_SHOWN_EVERY = 50


def main() -> None:
    """Fit, calibrate, and write the directory with its card."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="directory of adapter, head and card")
    parser.add_argument("--encoder", type=Path, required=True, help="directory of all-MiniLM-L6-v2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=FitSettings.steps, help="batches (default: %(default)s)")
    options = parser.parse_args()
    settings = FitSettings(steps=options.steps)

    def progress(step: int, loss: float) -> None:
        if step % _SHOWN_EVERY == 0 or step == settings.steps:
            print(f"{step}/{settings.steps} loss {loss:.4f}", file=sys.stderr)

    try:
        encoder, head = fit(options.encoder, options.out, options.seed, settings, progress)
        head.calibration = calibrated(encoder, head)
        head.save(options.out / HEAD_FILE)
        write_text(options.out / "README.md", card(options.out, encoder, head, options.seed))
    except RPGError as error:
        sys.exit(f"error: {error}")


def card(directory: Path, encoder: TextEncoder, head: ClassHead, seed: int) -> str:
    """The model card of a directory, with what was measured on validation properties."""
    share = measure(encoder, head, *described(Part.validation)).share_right()
    files = "".join(
        f"| `{name}` | {(directory / name).stat().st_size:,} | `{sha256(directory / name)}` |\n"
        for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, HEAD_FILE)
    )
    return CARD.format(share=share, seed=seed, encoder=head.encoder, files=files)


CARD = """---
license: apache-2.0
base_model: sentence-transformers/all-MiniLM-L6-v2
library_name: peft
---
# Words for CIFAR-10's classes

From a description, such as "things with wings", to the classes of CIFAR-10 that it means (airplane,
bird), the probability of each, and how sure that is. A LoRA adapter changes the sentence encoder
all-MiniLM-L6-v2 (Apache-2.0, not included; the digest of its files is
`{encoder}`), and a head with one hidden layer reads
its embeddings.

```python
from rpg.words.sentences import SentenceUnderstanding

understanding = SentenceUnderstanding.load(Path("DIRECTORY"), Path("all-MiniLM-L6-v2"))
understood = understanding.understand("things with wings")
understood.classes, understood.probabilities, understood.sureness, understood.is_sure
```

`rpg export DIRECTORY OUT --base all-MiniLM-L6-v2` writes the fine-tuned encoder for
`rpg register --encoder OUT`.

It was trained with seed {seed}, by `python -m rpg.words.make`, on descriptions that are written from the
training properties in `rpg/words/data/`. The share of right bits on validation properties, by which settings
were chosen, is {share:.3f}. `benchmarks/words.md` has the measurements on test properties and on the
published descriptions.

It knows English, and what the ten classes have in common. What is far from the training properties is
guessed; the probabilities say so. It is not meant for any other use.

| file | bytes | SHA-256 |
| --- | ---: | --- |
{files}"""


if __name__ == "__main__":
    main()
