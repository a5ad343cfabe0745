"""Write the JSON Schema of ``report.json`` beside its classes: ``make schema``."""

import json
from pathlib import Path

import msgspec

from grpo_harness.report import schema


def main() -> None:
    """Write the file."""
    path = Path(schema.__file__).parent / "report.schema.json"
    text = json.dumps(msgspec.json.schema(schema.Content), indent=1, sort_keys=True)
    path.write_text(f"{text}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
