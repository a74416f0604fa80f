"""`packtrain schema`: what a recipe may say, for editors."""

from __future__ import annotations

import json

from trainer.recipe_schema import json_schema


def schema() -> None:
    """Print the recipe's JSON schema.

    Saved beside a recipe it gives completion and checks in editors with a YAML language server:
    `packtrain schema > recipe.schema.json`, and as the recipe's first line
    `# yaml-language-server: $schema=recipe.schema.json`.
    """
    print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
