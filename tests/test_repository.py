"""What the repository promises about itself."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import environment

import distill_dmd2
import evaluate
import export
import sample
import train_assemble
import train_foster

ROOT = Path(train_foster.__file__).parent
SCRIPTS = {
    "train_foster.py": train_foster,
    "train_assemble.py": train_assemble,
    "distill_dmd2.py": distill_dmd2,
    "sample.py": sample,
    "evaluate.py": evaluate,
    "export.py": export,
}
STUDENT = [999, 749, 499, 249]


def readme_commands():
    """Every call of a script in README.md and in the scripts' docstrings: (script, arguments)."""
    texts = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    texts += [script.__doc__ for script in SCRIPTS.values()]
    for text in texts:
        for line in text.replace("\\\n", " ").splitlines():
            line = line.split("#")[0]
            for name in SCRIPTS:
                if re.search(rf"(python|launch)\b.* {name}", line):
                    arguments = shlex.split(line.split(name, 1)[1])
                    while arguments and arguments[-1] in ("&", "..."):
                        arguments.pop()
                    yield name, [a.replace("$i", "3") for a in arguments]


def test_documented_commands_parse(monkeypatch):
    commands = list(readme_commands())
    assert len(commands) >= 12 and {name for name, _ in commands} == set(SCRIPTS)
    for name, arguments in commands:
        monkeypatch.setattr(train_assemble.Path, "is_dir", lambda path: True)  # experts of earlier commands
        monkeypatch.setattr(
            train_assemble.tsm_lora,
            "read_folder",
            lambda folder: [({"num_intervals": 1, "timesteps": [0, 999], "student_timesteps": STUDENT}, folder)],
        )
        SCRIPTS[name].parse_args(arguments)


def test_code_is_ruff_clean():
    for command in (["check", "."], ["format", "--check", "."]):
        done = subprocess.run([sys.executable, "-m", "ruff", *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_every_flag(name, capsys):
    with pytest.raises(SystemExit) as ended:
        SCRIPTS[name].parse_args([*(["loss"] if name == "evaluate.py" else []), "--help"])
    flags = set(re.findall(r'(?:add|parser\.add_argument|loss\.add_argument)\("(--\w+)"', (ROOT / name).read_text()))
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and len(flags) >= 3
    assert not [flag for flag in flags if flag not in shown]


def test_every_flag_is_used():
    for name in ("train_foster.py", "train_assemble.py", "distill_dmd2.py", "sample.py"):
        source = (ROOT / name).read_text() + (ROOT / "data.py").read_text()
        flags = re.findall(r'add\("--(\w+)"', source)
        assert len(flags) > 15
        for flag in flags:
            read = re.search(rf"args\.{flag}\b", source) or re.search(rf'in \([^)]*"{flag}"[^)]*\):', source)
            assert read, f"{name}: --{flag} is never read"


def test_prompt_files_are_the_worlds():
    from mini import world

    for split, count in world.PROMPTS.items():
        lines = (ROOT / "mini" / "prompts" / f"{split}.txt").read_text().splitlines()
        assert lines == [p for category in world.CATEGORIES for p in world.prompts(category, split)]
        assert len(lines) == count * len(world.CATEGORIES)


def test_speed_benchmark_runs(tmp_path):
    """One round on the mini model: every variant is built and timed."""
    command = [sys.executable, ROOT / "benchmarks/speed.py", "--rounds", "1", "--output_file", tmp_path / "speed.json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert {"train", "sample"} <= json.loads((tmp_path / "speed.json").read_text()).keys()
