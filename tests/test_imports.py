"""Imports go one way, and other rules that a look at the source can check."""

import ast
import pathlib

import pytest

import sora_jax

PACKAGE = pathlib.Path(sora_jax.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path):
  parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
  return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path):
  """Modules that a file imports, anywhere in it, by full name."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{path}: relative import"
      # `from sora_jax import train` imports a module, `from x import name` may not.
      names |= {f"{node.module}.{alias.name}" for alias in node.names}
      names.add(node.module)
  return names


IMPORTS = {module_name(path): imports_of(path) for path in FILES}


def is_in(name, modules):
  return any(name == module or name.startswith(f"{module}.") for module in modules)


def inside(*modules):
  """The modules of the package at or below these names."""
  found = {n for n in IMPORTS if is_in(n, [f"sora_jax.{m}" for m in modules])}
  for module in modules:
    assert any(is_in(n, [f"sora_jax.{module}"]) for n in found), f"no {module}"
  return found


def own(name):
  """What a module imports of the package itself."""
  return {i for i in IMPORTS[name] if i in IMPORTS and i != "sora_jax"}


PURE = ("patches", "tiling", "diffusion", "sampler", "prompting", "lora")
LEAVES = (
  "sharding", "optim", "checkpoint", "metrics", "hlo", "hosts", "goodput", "profiling",
  "sweeps", "curves", "streamed", "hardware", "estimate", "gpu_target",
  "ahead",
)  # fmt: skip
COMMANDS = (
  "main",
  "stages",
  "recipe",
  "prepare",
  "train_vae",
  "encode",
  "train_dit",
  "packing",
  "denoiser",
  "jobs",
  "layout",
  "generate",
  "sample",
  "evaluate",
  "evaluate_prompting",
  "autoencoder",
  "text_encoder",
  "import_weights",
  "export_weights",
  "plan",
  "plan_report",
  "plan_search",
  "packing_load",
  "programs",
  "finetune",
)
# Modules -> what of the package they may import. All of the package is listed.
ALLOWED = {
  PURE: PURE,
  ("models",): ("models", "patches", "lora"),
  ("weights",): ("weights", "models"),
  ("tasks",): ("tasks", "models", *PURE),
  LEAVES: LEAVES,
  ("train",): ("tasks", *LEAVES),
  ("data", "attributes"): ("data", "patches", "attributes"),
  COMMANDS: ("",),
}


def test_every_module_has_a_place():
  placed = set().union(*(inside(*modules) for modules in ALLOWED))
  assert placed == set(IMPORTS) - {"sora_jax"}


@pytest.mark.parametrize("modules", ALLOWED, ids=lambda modules: modules[0])
def test_imports_go_one_way(modules):
  allowed = [f"sora_jax.{m}".rstrip(".") for m in ALLOWED[modules]]
  for name in inside(*modules):
    wrong = {i for i in own(name) if not is_in(i, allowed)}
    assert not wrong, f"{name} imports {sorted(wrong)}"


def test_train_knows_of_the_tasks_only_their_contract():
  assert not {
    i for i in own("sora_jax.training.loop") if i.startswith("sora_jax.tasks.")
  }


def test_no_import_cycles():
  done, path = set(), []

  def visit(name):
    assert name not in path, f"cycle: {' -> '.join([*path, name])}"
    if name not in done:
      path.append(name)
      for other in sorted(own(name)):
        visit(other)
      path.pop()
      done.add(name)

  for name in IMPORTS:
    visit(name)


def test_nothing_imports_a_command_but_commands():
  commands = inside(*COMMANDS)
  for name in set(IMPORTS) - commands:
    assert not own(name) & commands, name


def test_flax_is_only_in_models():
  for name, imports in IMPORTS.items():
    if not is_in(name, ["sora_jax.models"]):
      assert not any(is_in(i, ["flax"]) for i in imports), name


@pytest.mark.parametrize("layer", ["models", "tasks", *PURE])
def test_networks_and_math_do_no_io(layer):
  allowed = ["jax", "numpy", "flax", "tokamax", "math", "functools", "dataclasses"]
  allowed += ["collections", "typing", "re", "sora_jax"]
  for name in inside(layer):
    wrong = {i for i in IMPORTS[name] if not is_in(i, allowed)}
    assert not wrong, f"{name} imports {sorted(wrong)}"


# Grain starts workers that import the data modules: what they import, each pays for.
WITHOUT_JAX = ("clips", "video", "sources", "shapes", "records", "tokenizer", "pack")


@pytest.mark.parametrize("module", [*WITHOUT_JAX, "pipeline"])
def test_data_does_not_import_jax(module):
  (name,) = inside(f"data.{module}")
  reached, todo = set(), [name]
  while todo:
    for i in IMPORTS[todo.pop()]:
      if i in IMPORTS and i not in reached:
        reached.add(i)
        todo.append(i)
  for other in {name, *reached}:
    assert not any(is_in(i, ["jax", "flax", "optax"]) for i in IMPORTS[other]), other


def test_no_print():
  for path in FILES:
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        assert node.func.id != "print", f"{path}:{node.lineno}"


def test_names_say_what_is_inside():
  for path in [*FILES, *PACKAGE.rglob("*/")]:
    words = set(path.stem.split("_"))
    assert not words & {"util", "utils", "helper", "helpers", "misc", "common"}, path


def test_modules_and_public_functions_say_what_they_are():
  for path in FILES:
    tree = ast.parse(path.read_text())
    if not tree.body:
      continue
    assert ast.get_docstring(tree), path
    for node in tree.body:
      if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        described = node.name.startswith("_") or ast.get_docstring(node)
        assert described, f"{path}:{node.lineno}: {node.name} has no docstring"
