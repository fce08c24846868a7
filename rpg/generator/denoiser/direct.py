"""What the denoisers are compared with: no diffusion, a token is predicted from its prototype alone."""

from torch import Tensor, nn


class DirectPrediction(nn.Module):
    """A linear layer from prototypes [N, prototype_width] to tokens [N, token_size].

    It has the interface of a denoiser, but sees neither the noisy token nor its timestep. So the loss is the
    squared error of the predicted token, which makes it the mean of all tokens that have this prototype.
    Source: the ablation "no diffusion" of arXiv 2501.11587, where the prototype itself is the token.
    """

    def __init__(self, token_size: int, prototype_width: int) -> None:
        super().__init__()
        self.output = nn.Linear(prototype_width, token_size)

    def forward(self, x: Tensor, t: Tensor, prototype: Tensor) -> Tensor:
        """Predict the tokens [N, token_size] of `prototype`, whatever `x` and `t` are."""
        return self.prepare(prototype)

    def prepare(self, prototype: Tensor) -> Tensor:
        """The predicted tokens, [N, token_size]."""
        token: Tensor = self.output(prototype)
        return token

    def denoise(self, x: Tensor, t: Tensor, token: Tensor) -> Tensor:
        """What `prepare` returned."""
        return token
