"""The published denoiser: a 1-D convolutional network over the token's values, with skip connections."""

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn

from rpg.errors import RPGError
from rpg.generator.embeddings import TimestepEmbedding


class ConditionalUNet(nn.Module):
    """Convolutions of constant length over a token; every layer sees the prototype and the timestep.

    Layer i computes ELU(BatchNorm(conv_i((x + c) · t))), the last one the convolution alone, with c the
    prototype and t the timestep, both brought to the token's length. The first len(channels) // 2 + 1 layers
    are the encoder; the outputs of all but its last two are added to the decoder layers' inputs, in reverse.
    Source: the published code of arXiv 2501.11587, whose parameter names these are.

    Raises:
        RPGError: if `channels` is not an odd number of at least 5 values that reads the same backwards and
            starts with 1, or `kernel_size` is even.
    """

    def __init__(
        self, token_size: int, prototype_width: int, channels: Sequence[int], kernel_size: int
    ) -> None:
        super().__init__()
        channels = list(channels)
        odd = len(channels) >= 5 and len(channels) % 2 == 1
        if not odd or channels[0] != 1 or channels != channels[::-1]:
            raise RPGError(
                f"ConditionalUNet: channels: expected an odd number of at least 5 values, a palindrome that "
                f"starts with 1, got {channels}"
            )
        if kernel_size % 2 == 0:
            raise RPGError(f"ConditionalUNet: kernel_size: expected an odd value, got {kernel_size}")
        self.time_embedder = TimestepEmbedding(token_size)
        self.condi_embedder = nn.Linear(prototype_width, token_size)
        layers = [
            nn.Sequential(
                nn.Conv1d(before, after, kernel_size, padding=kernel_size // 2),
                nn.Sequential(nn.BatchNorm1d(after), nn.ELU()),
            )
            for before, after in pairwise(channels)
        ]
        layers[-1] = nn.Sequential(layers[-1][0])
        encoder_layers = len(channels) // 2 + 1
        self.encoder_list = nn.ModuleList(layers[:encoder_layers])
        self.decoder_list = nn.ModuleList(layers[encoder_layers:])

    def forward(self, x: Tensor, t: Tensor, prototype: Tensor) -> Tensor:
        """Predict for noisy tokens, [N, token_size] -> [N, token_size].

        In training mode the tokens of a batch influence each other through BatchNorm. In evaluation mode each
        token's prediction is independent of the others.

        Args:
            x: noisy tokens [N, token_size].
            t: int64 timesteps [G]; the rows of `x` come in G equal groups, each at one timestep.
            prototype: [N, prototype_width].
        """
        return self.denoise(x, t, self.prepare(prototype))

    def prepare(self, prototype: Tensor) -> Tensor:
        """The prototype at the token's length, [N, token_size], which sampling computes once a token."""
        condition: Tensor = self.condi_embedder(prototype)
        return condition

    def denoise(self, x: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        """Predict like `forward`, from the prototypes that `prepare` brought to the token's length."""
        time = self.time_embedder(t).repeat_interleave(len(x) // len(t), dim=0).unsqueeze(1)
        condition = condition.unsqueeze(1)
        x = x.unsqueeze(1)
        skips = []
        for layer in self.encoder_list:
            x = layer((x + condition) * time)
            skips.append(x)
        del skips[-2:]
        for layer in self.decoder_list:
            x = layer((x + skips.pop() + condition) * time)
        return x.squeeze(1)
