"""The resource lock: it is of today's source, within the limits, and the compiler agrees; what is wrong is said."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("triton")

from importlib.metadata import version

from genkit.attention.kernels import aot, lock, tiles
from genkit.cli.app import app

LOCK = lock.read()
SAME = LOCK["triton"] == version("triton")


def resources(row):
    return aot.Resources(**{key: row[key] for key in ("registers", "stack", "shared", "tensor", "mma")})


def test_lock_has_every_entry_of_todays_source_and_tiles():
    assert lock.stale(LOCK) == [], "write the lock anew: genkit attention lock"
    assert list(LOCK["entries"]) == [entry.name for entry in lock.entries()]


def test_every_entry_is_within_the_limits():
    for entry in lock.entries():
        row = LOCK["entries"][entry.name]
        assert entry.problems(resources(row)) == []
        assert row["stack"] == 0
        assert row["registers"] <= 255
        assert row["shared"] <= tiles.SHARED_MEMORY[entry.architecture]


def test_rows_of_8_0_fit_8_6_and_8_9_too():
    shared = [row["shared"] for name, row in LOCK["entries"].items() if "/sm80/" in name]
    assert max(shared) <= tiles.SHARED_MEMORY[86] == tiles.SHARED_MEMORY[89]


def test_matrix_instructions_are_those_of_the_architecture():
    for name, row in LOCK["entries"].items():
        kernel, architecture, rest = name.split("/", 2)
        if kernel in ("probe_forward", "probe_dq", "probe_dkv", "tangent_forward") and "fp32" not in rest:
            assert lock.FAMILIES[int(architecture[2:])] in row["mma"], name


# Each kernel once, each architecture of forward and tangent: 13 entries. `genkit attention lock --check` compiles 28, with --all
# everything.
@pytest.mark.parametrize(
    "entry",
    [e for e in lock.sample() if e.architecture == 90 or e.kernel in ("probe_forward", "tangent_forward")],
    ids=lambda entry: entry.name,
)
def test_compiler_agrees(entry):
    assert lock.compare(LOCK, {entry: entry.compile()}, version("triton")) == []


def test_spills_and_too_much_shared_memory_are_found():
    """A tile that is too large: float32, twice as wide as is served."""
    entry = lock.Entry(kernel="probe_forward", architecture=80, head_dim=128, dtype="fp32", masked=False)
    found = aot.compile_kernel(
        "probe_forward", 80, 128, "fp32", masked=False, chosen=tiles.Tile(block_l=64, block_s=32, warps=8, stages=2)
    )
    problems = entry.problems(found)
    assert any("registers spill" in problem for problem in problems)
    assert any("shared memory, of which sm_80 has 101,376" in problem for problem in problems)


def test_too_much_tensor_memory_is_found():
    entry = next(e for e in lock.entries() if e.name == "probe_forward/sm100/d64/fp16")
    found = aot.Resources(registers=100, stack=0, shared=1024, tensor=640, mma="tcgen05")
    assert entry.problems(found) == ["probe_forward/sm100/d64/fp16: 640 columns of tensor memory, of which there are 512"]


def test_wrong_matrix_instructions_are_found():
    entry = next(e for e in lock.entries() if e.name == "probe_forward/sm90/d64/fp16")
    found = aot.Resources(registers=100, stack=0, shared=1024, tensor=0, mma="mma.sync")
    assert entry.problems(found) == ["probe_forward/sm90/d64/fp16: matrix instructions mma.sync, not wgmma"]


def test_another_tritons_figures_may_differ_but_not_break_limits():
    entry = lock.entries()[0]
    row = LOCK["entries"][entry.name]
    other = aot.Resources(registers=row["registers"] - 1, stack=0, shared=row["shared"], tensor=0, mma=row["mma"])
    assert lock.compare(LOCK, {entry: other}, "99.0") == []
    same = lock.compare(LOCK, {entry: other}, LOCK["triton"])
    assert same == [f"{entry.name}: registers was {row['registers']}, is {row['registers'] - 1}"]
    spilled = aot.Resources(registers=255, stack=8, shared=row["shared"], tensor=0, mma=row["mma"])
    assert lock.compare(LOCK, {entry: spilled}, "99.0") == [f"{entry.name}: 8 bytes of stack: registers spill"]


def run(*arguments):
    return CliRunner().invoke(app, ["attention", "lock", *arguments])


@pytest.fixture
def one():
    """Options that compile a single quick entry."""
    return ["--only", "probe_map/sm80/d64/fp16/mask"]


def test_command_checks(one):
    done = run("--check", "--json", *one)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["ok"]
    assert list(document["compiled"]) == [one[1]]
    assert document["compiled"][one[1]] == LOCK["entries"][one[1]] or not SAME


def test_command_finds_another_figure_and_another_source(one, tmp_path):
    changed = json.loads(json.dumps(LOCK))
    changed["entries"][one[1]]["registers"] += 1
    changed["entries"]["probe_map/sm90/d64/fp16/mask"]["fingerprint"] = "0"
    del changed["entries"]["probe_dq/sm90/d64/fp16"]
    file = tmp_path / "lock.json"
    lock.write(changed, file)
    done = run("--check", "--json", "--file", str(file), *one)
    assert done.exit_code == 1
    problems = json.loads(done.stdout)["problems"]
    assert any("changed since it was locked" in p and p.startswith("probe_map/sm90") for p in problems)
    assert any(p.startswith("probe_dq/sm90/d64/fp16:") for p in problems)
    assert any(p.startswith(f"{one[1]}: registers was") for p in problems) or not SAME


def test_command_under_another_triton_says_so(one, tmp_path):
    file = tmp_path / "lock.json"
    lock.write({**LOCK, "triton": "99.0"}, file)
    done = run("--check", "--file", str(file), *one)
    assert done.exit_code == 0, done.output
    assert "The lock is of Triton 99.0" in done.output


def test_command_writes_what_changed_only(one, tmp_path):
    changed = json.loads(json.dumps(LOCK))
    changed["entries"][one[1]]["fingerprint"] = "0"
    file = tmp_path / "lock.json"
    lock.write({**changed, "triton": version("triton")}, file)
    done = run("--json", "--file", str(file))
    assert done.exit_code == 0, done.output
    assert list(json.loads(done.stdout)["compiled"]) == [one[1]]
    assert lock.read(file)["entries"][one[1]]["fingerprint"] == LOCK["entries"][one[1]]["fingerprint"]


def test_command_refuses_what_it_does_not_know(tmp_path):
    done = run("--only", "nothing/*")
    assert done.exit_code == 2
    assert "No entry matches 'nothing/*'" in done.output
    done = run("--check", "--file", str(tmp_path / "none.json"))
    assert done.exit_code == 2
    assert "is not a resource lock" in done.output
