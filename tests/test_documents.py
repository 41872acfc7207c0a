"""What documents say exists: commands, flags, config keys, files and anchors."""

import re
import shlex

import pytest
import tiny
import warm
from absl import flags
from ml_collections import config_flags

DOCUMENTS = sorted(
  path
  for pattern in ("*.md", ".github/*.md", "[!.]*/README.md", "sora_jax/*/README.md")
  for path in tiny.ROOT.glob(pattern)
)
NAMES = [str(path.relative_to(tiny.ROOT)) for path in DOCUMENTS]


def commands_of(text):
  """Commands of our modules and scripts in code blocks, as lists of words.

  Variables that a block sets (run="python ...") are put in place of their names.
  """
  for block in re.findall(r"^```\w*\n(.*?)^```", text, re.S | re.M):
    variables = {}
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
      if assigned := re.fullmatch(r'(\w+)="(.*)"', line):
        variables[assigned[1]] = assigned[2]
        continue
      for name, value in variables.items():
        line = line.replace(f"${name}", value)
      for part in re.split(r"&&", line):
        words = shlex.split(part, comments=True)
        if words[:1] == ["python"]:
          yield words[1:]


def target_of(words) -> tuple[str, ...]:
  """What Python runs: ("-m", module) or (file,)."""
  return tuple(words[:2]) if words[0] == "-m" else (words[0],)


def examples():
  """(document, command) of all documents."""
  for name, path in zip(NAMES, DOCUMENTS, strict=True):
    for words in commands_of(path.read_text()):
      yield name, words


ALL = list(examples())
TARGETS = sorted({target_of(words) for _, words in ALL})


def has_no_flags(target):
  return target[-1].startswith((".github/", "tests/", "tests."))


def anchor(heading: str) -> str:
  """The name by which GitHub links to a heading."""
  return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
  path = tiny.ROOT / name
  for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
    if link.startswith(("http://", "https://")):
      continue
    file, _, part = link.partition("#")
    target = (path.parent / file) if file else path
    assert target.exists(), f"{name}: {link}"
    if part:
      headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
      assert part in map(anchor, headings), f"{name}: {link}"


def test_the_readme_is_short():
  assert len((tiny.ROOT / "README.md").read_text().splitlines()) <= 200


def test_commands_are_found():
  text = '```\nrun="python -m a.b --x=1"\n$run --y \\\n  --z=2  # why\n```\npython c\n'
  assert list(commands_of(text)) == [["-m", "a.b", "--x=1", "--y", "--z=2"]]
  assert {"README.md", "launch/README.md"} <= {name for name, _ in ALL}
  assert len(ALL) > 40


@pytest.mark.parametrize("target", TARGETS, ids=" ".join)
def test_what_commands_run_exists(target):
  if target[0] == "-m":
    path = tiny.ROOT / target[1].replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()
  else:
    assert (tiny.ROOT / target[0]).is_file()


@pytest.mark.slow
@pytest.mark.parametrize(
  "target", [t for t in TARGETS if not has_no_flags(t)], ids=" ".join
)
def test_flags_of_commands_exist(target, commands):
  module = target[1] if target[0] == "-m" else tiny.ROOT / target[0]
  process = warm.Process(module, ["--helpfull"], commands.environment())
  _, help_text = process.communicate(timeout=300)
  known = set(re.findall(r"^  --(?:\[no\])?([\w-]+)", help_text, re.M))
  assert known, help_text
  for name, words in ALL:
    if target_of(words) != target:
      continue
    rest = words[len(target) :]
    own = rest[: rest.index("--")] if "--" in rest else rest
    for word in own:
      if word.startswith("--") and not word.startswith("--config."):
        assert word[2:].split("=")[0] in known, f"{name}: {word} of {' '.join(target)}"


def test_config_keys_of_commands_exist():
  checked = 0
  for name, words in ALL:
    given = [w for w in words if w.startswith(("--config=", "--config."))]
    if not given:
      continue
    arguments = [
      f"--config={tiny.ROOT / w.partition('=')[2]}" if w.startswith("--config=") else w
      for w in given
    ]
    arguments = ["program", *arguments]
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", values, sys_argv=arguments)
    values(arguments)  # a key that is not there raises
    assert values.config is not None, name
    checked += 1
  assert checked > 15
