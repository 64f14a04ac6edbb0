"""Settings of whole trainings by name, a commented YAML file each: ``textok-fast train tokenizer --recipe NAME``.

A file has a line ``about`` and a section for each kind of run that it is for: ``tokenizer``, with what
:class:`~textok_fast.config.TokenizerTrainConfig` has, and ``generator``, with what
:class:`~textok_fast.config.GeneratorTrainConfig` has. What a section does not name keeps its default. With ``extends`` the
sections lie over those of another recipe. docs/training.md lists them all.
"""

from textok_fast.config import read_recipe, recipe_about, recipe_names, recipe_path, recipe_sections

__all__ = ["read_recipe", "recipe_about", "recipe_names", "recipe_path", "recipe_sections"]
