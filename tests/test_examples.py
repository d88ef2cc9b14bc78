"""Every example runs as a script, as a reader would run it, and prints what it promises."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"

PUBLISHED = ("batch_first_series", "bidirectional_stack", "memory_cell", "step_by_step", "two_layers")


def run(script: Path | str, *arguments: str, by: tuple[str, ...] = (), warned: bool = False) -> str:
    """What a script prints, given its path or the name of an example; packages that it needs may warn."""
    script = script if isinstance(script, Path) else EXAMPLES / f"{script}.py"
    command = [sys.executable, *by, str(script), *arguments]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    place = script.parent if script.parent != EXAMPLES else None
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=env, cwd=place)
    assert done.returncode == 0, done.stderr
    assert warned or "Warning" not in done.stderr
    return done.stdout


def table(printed: str) -> list[list[float]]:
    """The figures of each line that starts with a row number, or with `h` or `c` and one."""
    lines = re.findall(r"^(?:[hc])? +(\d+  .*)$", printed, re.MULTILINE)
    return [[float(word) for word in line.split()] for line in lines]


def test_no_example_is_left_out():
    names = {"digits", "gates", "speech_encoder", "keyword_spotter", "voice_activity"}
    names |= {"ensemble", "private", "quantize", "train_distributed", "batch_inference"}
    names |= {"tensorrt_from_export", "tensorrt_from_onnx"}
    names |= {f"published/{name}" for name in PUBLISHED}
    found = (*EXAMPLES.glob("*.py"), *(EXAMPLES / "published").glob("*.py"))
    assert {path.relative_to(EXAMPLES).with_suffix("").as_posix() for path in found} == names


def test_no_example_shadows_a_package():
    """A script's folder comes first on the path: onnx.py would be found in place of onnx."""
    for example in EXAMPLES.rglob("*.py"):
        assert importlib.util.find_spec(example.stem) is None


def test_batch_first_series():
    rows = table(run("published/batch_first_series"))
    assert [row[0] for row in rows] == list(range(30))
    for t, _, *four, without_loop in rows:
        assert len(set(four)) == 1
        assert (without_loop == four[0]) == (t == 0)


def test_memory_cell():
    rows = table(run("published/memory_cell"))
    h, c = rows[:5], rows[5:]
    assert [row[1] for row in h] == [0, 0, 0, 0.3, 0]
    assert [row[1] for row in c] == [0.2, 0.3, 0.3, 0.3, 0]
    for _, published, *four in rows:
        assert len(set(four)) == 1 and round(four[0], 1) == published


def test_gates(tmp_path):
    printed = run("gates", "--file", str(tmp_path / "gates.png"))
    rows = [list(map(float, line.split())) for line in printed.splitlines()[1:6]]
    gates = [[0 if gate < 0.01 else 1 if gate > 0.99 else gate for gate in row[1:4]] for row in rows]
    # x2 = 1 writes, x3 = 1 reads, x2 = -1 forgets
    assert gates == [[1, 1, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert [round(row[4], 1) for row in rows] == [0.2, 0.3, 0.3, 0.3, 0]
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_bidirectional_stack():
    rows = table(run("published/bidirectional_stack"))
    assert [row[:3] for row in rows] == [[n, d, steps] for n in (1, 2) for d in (1, 2) for steps in (1, 2, 7)]
    for layers, directions, steps, fused, unrolled, ours, in_loop in rows:
        assert fused == unrolled and ours < 1e-12
        assert (in_loop > 1e-3) == (layers == directions == 2 and steps > 1)


def test_step_by_step():
    rows = table(run("published/step_by_step"))
    assert [row[0] for row in rows] == [0, 1, 2] * 2
    assert all(len(row) == 5 and len(set(row[1:])) == 1 for row in rows)


def test_speech_encoder():
    printed = run("speech_encoder")
    rows = re.findall(r"^ +(\d+) +(\d+)  (\[.*?\]) +(\S+)$", printed, re.MULTILINE)
    assert len(rows) == 5 and "LSTM: 0" in printed
    for count, padded, lengths, difference in rows:
        lengths = [int(n) for n in re.findall(r"\d+", lengths)]
        assert (len(lengths), max(lengths)) == (int(count), int(padded)) and float(difference) < 1e-5


def test_two_layers():
    rows = table(run("published/two_layers"))
    assert len(rows) == 5
    for _, *figures in rows:
        published, *results = [figures[i : i + 3] for i in range(0, 15, 3)]
        assert results == [published] * 4


def test_ensemble():
    printed = run("ensemble", "--models", "3")
    assert float(re.search(r"3 models: \[3, 8, 1\], largest difference (\S+)", printed)[1]) < 1e-6
    ratios = re.findall(r"^(vmap|loop, \w+) .* ms  (\S+) of the fused loop$", printed, re.MULTILINE)
    assert [name for name, _ in ratios] == ["vmap", "loop, unrolled", "loop, fused"]


@pytest.mark.heavy
def test_private():
    pytest.importorskip("opacus", reason="needs opacus: make test-heavy")
    printed = run("private", "--epochs", "2", warned=True)
    right = re.search(r"the nn.GRU, whose parameters were trained: (\d+) of 450 right", printed)
    assert right and int(right[1]) > 90  # a tenth of 450 are right by chance
    assert 0 < float(re.search(r"epsilon (\S+) at", printed)[1]) < 20


@pytest.mark.heavy
@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs a PyTorch with torch.distributed")
def test_train_distributed():
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    printed = run("train_distributed", "--epochs", "2", by=torchrun, warned=True)
    lines = re.findall(r"^(.*\S) +(\d+) of 450 right, scores differ by (\S+) from one process$", printed, re.MULTILINE)
    assert [name for name, *_ in lines] == [
        "nn.GRU, trained by DDP on 2 processes",
        "its checkpoint in a sharded unrolled model",
        "the same, trained on by FSDP2 on 2 processes",
        "its checkpoint in an nn.GRU",
    ]
    assert all(float(difference) < 1e-4 for *_, difference in lines)
    right = [int(right) for _, right, _ in lines]
    assert right[0] == right[1] < right[2] == right[3] and right[3] > 150  # 45 are right by chance


@pytest.mark.heavy
def test_batch_inference():
    pytest.importorskip("ray", reason="needs ray: make test-heavy")
    printed = run("batch_inference", "--epochs", "2", warned=True)
    found = re.search(r"^450 rows from (\d) of 2 workers, (\d+) right$", printed, re.MULTILINE)
    assert found and int(found[1]) >= 1 and int(found[2]) > 150  # 45 are right by chance
    assert float(re.search(r"largest difference from nn.GRU: (\S+)", printed)[1]) < 1e-5


@pytest.mark.heavy
def test_quantize():
    pytest.importorskip("torchao", reason="needs torchao: make test-heavy")
    printed = run("quantize", "--epochs", "10", warned=True)
    right = [int(n) for n in re.findall(r"(\d+) of 450 right", printed)]
    assert len(right) == 5 and min(right) > right[0] - 10 > 350
    assert "plan default: " in printed and "18 of 19 products are float" in printed
    assert "pt2e: 0 of 19 products are float" in printed


@pytest.mark.heavy
def test_digits(tmp_path):
    file = tmp_path / "digits.onnx"
    printed = run("digits", "--epochs", "2", "--file", str(file))
    rows = re.findall(r"^(nn\.GRU|unrolled.*?)  .* (\d+) of 450 +(\S+) +(\S+) ms$", printed, re.MULTILINE)
    assert [row[0].strip() for row in rows] == [
        "nn.GRU",
        "unrolled",
        "unrolled, torch.compile",
        "unrolled, ONNX Runtime",
    ]
    for _, same, difference, time in rows:
        assert int(same) == 450 and float(difference) <= 1e-4 and float(time) > 0
    graph = onnx.load(file).graph
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param
    assert not {"LSTM", "GRU", "RNN", "Loop", "Scan"} & {node.op_type for node in graph.node}


@pytest.mark.heavy
def test_voice_activity():
    printed = run("voice_activity")
    assert "states: lstm.h, lstm.c\n" in printed
    right = re.search(r"(\d+)% of the pieces are told right", printed)
    assert right and int(right[1]) >= 80
    rows = re.findall(r"^(torch|ONNX Runtime) +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.MULTILINE)
    assert [row[0] for row in rows] == ["torch", "ONNX Runtime"]
    for _, *figures in rows:
        difference, error, offline, factor = map(float, figures)
        assert difference < 1e-4 and error <= 2 * offline + 1e-6
        assert 0 < factor < 1, "slower than the audio"


@pytest.mark.heavy
def test_keyword_spotter():
    printed = run("keyword_spotter")
    told, there, wrong, others = map(
        int,
        re.search(
            r"^(\d+) of (\d+) frames after the word are told, and (\d+) of (\d+) others$", printed, re.M
        ).groups(),
    )
    assert told > 0.6 * there > 0 and wrong < 0.05 * others
    assert "states in the file: border, lstm.h, lstm.c\n" in printed
    rows = re.findall(r"^ *(\d+) pieces, (torch|ONNX Runtime) +largest difference (\S+)$", printed, re.MULTILINE)
    assert [row[:2] for row in rows] == [(n, way) for n in ("60", "240", "4") for way in ("torch", "ONNX Runtime")]
    assert all(float(difference) < 1e-5 for *_, difference in rows)


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("example", "target"), [("tensorrt_from_export", "torch_tensorrt"), ("tensorrt_from_onnx", "tensorrt")]
)
def test_what_tensorrt_is_given(example, target):
    """The part that needs no GPU: programs and files in every type, all of it in the target's table."""
    printed = run(example, "--prepare")
    assert len(re.findall(rf"^{target}: \d+ nodes, all offered$", printed, re.MULTILINE)) == 3
    if target == "torch_tensorrt":
        assert printed.count("  ok\n") == 9


@pytest.mark.gpu
@pytest.mark.heavy
@pytest.mark.parametrize(
    ("example", "package"), [("tensorrt_from_export", "torch_tensorrt"), ("tensorrt_from_onnx", "tensorrt")]
)
def test_tensorrt(example, package):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"needs {package}: pip install '.[tensorrt]'")
    printed = run(example)
    assert printed.count("unrolled engine") == 9
    assert printed.count("  ok\n") >= 9


PAGES = [
    str(page.relative_to(EXAMPLES.parent))
    for page in (EXAMPLES.parent / "README.md", *sorted((EXAMPLES.parent / "docs").glob("*.md")))
    if "```python" in page.read_text()
]


@pytest.mark.parametrize(
    "page", [page if page == "README.md" else pytest.param(page, marks=pytest.mark.heavy) for page in PAGES]
)
def test_readme(page, tmp_path):
    """The code of the README and of each page runs from top to bottom and prints what stands there, rounding apart."""
    readme = (EXAMPLES.parent / page).read_text()
    script = tmp_path / "readme.py"
    script.write_text("".join(re.findall(r"```python\n(.*?)```", readme, re.DOTALL)))
    expected = "".join(re.findall(r"```text\n(.*?)```", readme, re.DOTALL))
    assert expected
    rounding = r"\d\.\de[-+]\d\d"
    assert re.sub(rounding, "#", run(script)) == re.sub(rounding, "#", expected)
