"""A stranger's task family, as a test or a user names it: my_tasks.py:Sines and others."""

import time

import torch
from torch import Tensor, nn

from rpg.tasks.families import Metric, Task

INPUTS = torch.linspace(-2, 2, 64)[:, None]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.layers(inputs)
        return outputs


class Minimal:
    """The smallest family: a network, and how good it is."""

    def build_network(self) -> nn.Module:
        return Net()

    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        wanted = torch.sin(condition[0] * INPUTS) if condition else torch.sin(INPUTS)
        return {"mse": (network(INPUTS) - wanted).square().mean().item(), "largest": 1.0}


class Sines(Minimal):
    """Everything that a family may have, but for training."""

    metrics = (Metric("mse", higher_is_better=False, unit="V²"),)

    def predict(self, network: nn.Module, split: str) -> Tensor:
        return network(INPUTS)[:, 0] > 0

    def labels(self, condition: list[float], split: str) -> Tensor:
        return torch.sin(condition[0] * INPUTS[:, 0]) > 0

    def task_name(self, condition: list[float]) -> str:
        return f"sin {condition[0]:g}x"


class Answers(Minimal):
    """Answers alone: the accuracy follows."""

    evaluate = None  # type: ignore[assignment]
    predict = Sines.predict
    labels = Sines.labels


class Branching(Answers):
    """Code that torch.func.vmap cannot run."""

    def predict(self, network: nn.Module, split: str) -> Tensor:
        answers = network(INPUTS)[:, 0]
        return answers > 0 if answers.sum().item() < 1e9 else answers < 0


class Fickle(Answers):
    """Answers that are others when networks run side by side."""

    calls = 0

    def predict(self, network: nn.Module, split: str) -> Tensor:
        Fickle.calls += 1
        return network(INPUTS)[:, 0] > (0 if isinstance(network, Net) else 0.5)


class Trains(Sines):
    """A family that stage `collect` can train networks for."""

    def tasks(self, validation_tasks: int, seed: int) -> list[Task]:
        splits = ["heldout"] * 2 + ["validation"] * validation_tasks
        splits += ["train"] * (12 - len(splits))
        return [Task(f"{i}", [1 + i / 8], split) for i, split in enumerate(splits)]

    def backbone(self, config: object, seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return Net().state_dict()

    def fine_tune(
        self, backbone: dict[str, Tensor], models: list[tuple[Task, int]], config: object, seed: int
    ) -> list[dict[str, Tensor]]:
        trained = []
        for task, copy in models:
            network = Net()
            network.load_state_dict(backbone)
            torch.manual_seed(1000 * seed + copy)
            optimiser = torch.optim.Adam(network.parameters(), 0.03)
            for _ in range(150):
                inputs = 2 * torch.randn(64, 1)
                loss = (network(inputs) - torch.sin(task.condition[0] * inputs)).square().mean()
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            trained.append({name: value.detach() for name, value in network.state_dict().items()})
        return trained


class Fails(Minimal):
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        raise ValueError("no\nluck")


class Nan(Minimal):
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        return {"mse": float("nan")}


class Text(Minimal):
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        return "good"  # type: ignore[return-value]


class OtherMetric(Sines):
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        return {"loss": 1.0}


class Hangs(Minimal):
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        time.sleep(60)
        return {"mse": 0.0}


class HangsLater(Answers):
    """Hangs at every network whose first bias is 1."""

    def load(self, network: nn.Module, state_dict: dict[str, Tensor]) -> None:
        network.load_state_dict(state_dict)

    def predict(self, network: nn.Module, split: str) -> Tensor:
        if float(network.layers[3].bias[0]) == 1:
            time.sleep(60)
        return super().predict(network, split)


class Shape(Answers):
    def predict(self, network: nn.Module, split: str) -> Tensor:
        return network(INPUTS)[:, 0, None]


class Short(Answers):
    def labels(self, condition: list[float], split: str) -> Tensor:
        return torch.zeros(3, dtype=torch.bool)


class NeedsGpu(Minimal):
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        raise RuntimeError("No CUDA GPUs are available")


class NoNetwork:
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        return {}


class NoTest:
    def build_network(self) -> nn.Module:
        return Net()


class BadConstructor(Minimal):
    def __init__(self, room: str) -> None:
        self.room = room


class LoadsSome(Minimal):
    def load(self, network: nn.Module, state_dict: dict[str, Tensor]) -> None:
        for name, parameter in network.named_parameters():
            if name in state_dict:
                parameter.copy_(state_dict[name])

    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        return {"bias": network.get_parameter("layers.3.bias").item()}


class KeywordSplit(Minimal):
    def evaluate(
        self, network: nn.Module, condition: list[float], verbose: bool = False, *, split: str = "test"
    ) -> dict[str, float]:
        return {split: 1.0}


class Exits(Minimal):
    def evaluate(self, network: nn.Module, condition: list[float]) -> dict[str, float]:
        raise SystemExit(0)


class Referenced(Answers):
    """Tasks that networks answer which were not trained for them, and what its own were trained on."""

    def references(
        self, backbone: dict[str, Tensor], condition: list[float], split: str
    ) -> dict[str, Tensor]:
        network = Net().eval()
        network.load_state_dict(backbone)
        return {"the backbone": self.predict(network, split), "all wrong": ~self.labels(condition, split)}

    def batch(self, size: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
        inputs = 3 * torch.randn(size, 1, generator=random)
        return inputs, torch.sin(inputs)


class FailingReferences(Answers):
    def references(
        self, backbone: dict[str, Tensor], condition: list[float], split: str
    ) -> dict[str, Tensor]:
        return {"short": torch.zeros(3, dtype=torch.bool)}
