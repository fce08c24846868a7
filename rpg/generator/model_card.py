"""The model card (README.md) that is saved with a generator."""

from rpg.config import ConditionKind, GeneratorConfig


def model_card(
    config: GeneratorConfig,
    tensors: int,
    tokens: int,
    token_size: int,
    parameters: int,
    accuracy_table: str = "",
) -> str:
    """Markdown: what the generator makes, how to use it, and the accuracies, where there are any."""
    asks = {
        ConditionKind.vector: f"a condition of {config.condition.size} values"
        + (", the embedding of a description" if config.condition.encoder else "")
        + (f" ({config.condition.states} permutation states, by seed)" if config.condition.states else ""),
        ConditionKind.permutation: f"no condition ({config.condition.size} permutation states, by seed)",
        ConditionKind.none: "no condition",
    }[config.condition.kind]
    argument = (
        f"[[0.0] * {config.condition.size}]" if config.condition.kind == ConditionKind.vector else "None"
    )
    if config.condition.encoder:
        argument = '[generator.text_encoder().encode("DESCRIPTION")]'
    evaluation = f"\n## Accuracy\n\n{accuracy_table}" if accuracy_table else ""
    return f"""# Generator of neural networks

Makes checkpoints of one architecture: {tensors} tensors, cut into {tokens} tokens of {token_size} values.
It takes {asks}. {parameters:,} parameters: {config.recurrent.kind} recurrence,
{config.denoiser.kind} denoiser, {config.diffusion.prediction} prediction. Method: Recurrent Diffusion,
arXiv 2501.11587.

```python
from pathlib import Path
from rpg.sampling.generate import generate_models
from rpg.generator.generator import Generator

generator = Generator.from_pretrained("PATH/TO/THIS/DIRECTORY")
sampling = generator.config.sampling
files = generate_models(generator, {argument}, number=5, seed=0, out=Path("generated"), sampling=sampling)
```
{evaluation}"""
