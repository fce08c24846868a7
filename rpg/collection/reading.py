"""How the checkpoints of a collection are read: what `rpg register` decided, kept in `collection.json`."""

from dataclasses import dataclass, fields
from typing import Any

from rpg.errors import RPGError


@dataclass(frozen=True)
class Reading:
    """What is done to the content of every checkpoint file before it is a `state_dict`, in this order."""

    key: str | None = None
    """The mapping of tensors to take from PyTorch files that hold several, such as `state_dict_ema`; the keys
    of nested mappings are joined by dots. None: the only one."""
    unwrap: tuple[str, ...] = ()
    """Wrappers of modules whose marks are removed from names (`rpg.collection.wrappers`)."""
    ignore: tuple[str, ...] = ()
    """Patterns (as in a shell) of the names that are left out."""
    canonical_factors: bool = False
    """Whether the factors of LoRA adapters are made canonical (`rpg.collection.adapter`)."""

    @classmethod
    def from_json(cls, value: Any, where: str) -> "Reading":
        """Read what `to_json` returned; `where` names file and key for messages.

        Raises:
            RPGError: if the value is of another form.
        """
        if not isinstance(value, dict):
            raise RPGError(f"{where}: expected an object, got {value!r:.80}")
        names = [field.name for field in fields(cls)]
        if unknown := sorted(set(value) - set(names)):
            raise RPGError(f"{where}: unknown key '{unknown[0]}'; expected {', '.join(names)}")
        key, canonical = value.get("key"), value.get("canonical_factors", False)
        if not (key is None or isinstance(key, str)):
            raise RPGError(f"{where}: key: expected text, got {key!r:.80}")
        if not isinstance(canonical, bool):
            raise RPGError(f"{where}: canonical_factors: expected true or false, got {canonical!r:.80}")
        for name in ("unwrap", "ignore"):
            listed = value.get(name, [])
            if not (isinstance(listed, list) and all(isinstance(item, str) for item in listed)):
                raise RPGError(f"{where}: {name}: expected a list of text, got {listed!r:.80}")
        return cls(key, tuple(value.get("unwrap", [])), tuple(value.get("ignore", [])), canonical)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; settings that change nothing are left out."""
        values: dict[str, Any] = {
            "key": self.key,
            "unwrap": list(self.unwrap),
            "ignore": list(self.ignore),
            "canonical_factors": self.canonical_factors,
        }
        return {name: value for name, value in values.items() if value}


AS_STORED = Reading()
"""Nothing is done."""
