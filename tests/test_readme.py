"""The README cannot go stale: its equations, files, pictures and commands exist."""
import inspect
import json
import re
import shlex
import shutil
import tarfile

import pytest

from conftest import ROOT, launch, write_fashion, write_pictures

PAGES = {name: (ROOT / name).read_text() for name in (
    "README.md", ".assets/own.md", ".assets/exercises.md", ".assets/claims.md",
    ".assets/differences.md", ".assets/real.md", ".assets/lecture.md", ".assets/forks.md",
    "tests/README.md")}
EQUATIONS = re.findall(r"^\| ([\d, ]+) \| [^|]+ \| `(0\d_\w+\.py): ([^|]+?) \|$",
                       PAGES[".assets/differences.md"], re.M)
PRINTED = re.findall(r"^    (eq\. (?:5|6|7|11) .+?)(?=^    eq\.|^\S)", PAGES["README.md"], re.M | re.S)
COMMANDS = list(dict.fromkeys(re.findall(r"(?:python|--) (0\d_\w+\.py[^&|`\n]*)", "".join(
    PAGES[name] for name in ("README.md", ".assets/own.md", ".assets/exercises.md")))))


@pytest.mark.parametrize("numbers,file,functions", EQUATIONS)
def test_every_equation_is_where_the_table_says(stage, numbers, file, functions):
    """One of the functions named carries the number, in a comment or its docstring."""
    names = re.findall(r"\w+", functions.replace("called in", ""))
    source = "".join(inspect.getsource(getattr(stage(int(file[1])), name)) for name in names)
    for number in re.findall(r"\d+", numbers):
        assert re.search(rf"[Ee]qs?\. [\d, -]*\b{number}\b", source), number


def test_the_equations_printed_name_the_function_that_has_them(stage):
    """And the table of the differences has all of them."""
    found = {number for numbers, _, _ in EQUATIONS for number in re.findall(r"\d+", numbers)}
    assert found == {str(number) for number in range(1, 12)} and len(PRINTED) == 4
    for equation in PRINTED:
        number, file, name = re.search(r"eq\. (\d+).* 0(\d): (\w+)", equation, re.S).groups()
        source = inspect.getsource(getattr(stage(int(file)), name))
        assert re.search(rf"[Ee]qs?\. [\d, -]*\b{number}\b", source), equation


@pytest.mark.slow
def test_every_command_runs(stage, chain, tmp_path, monkeypatch):
    """Tiny and in the README's order, each on what those before it left."""
    shutil.copytree(chain, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))        # where data sets are looked for first
    write_fashion(tmp_path / "hub/datasets")
    write_pictures(stage, tmp_path / "trusted", 64)
    (tmp_path / "shards").mkdir()
    with tarfile.open(tmp_path / "shards/train-000.tar", "w") as tar:
        for file in sorted((tmp_path / "trusted").iterdir()):
            tar.add(file, file.name)
    assert len(COMMANDS) > 20
    for command in COMMANDS:
        file, *flags = shlex.split(command)
        kept = [flag for name, flag in zip(["", *flags], flags)
                if not {name, flag} & {"--steps", "--seeds", "--width", "--size"}]
        launch(stage, int(file[1]), [*kept, *["--smoke"] * (file[:2] not in ("03", "04"))])
        if file.startswith("02"):                          # "then 03", as the README says
            launch(stage, 3, [flag for name, flag in zip(["", *kept], kept)
                              if {name, flag} & {"--out", "--signal"}])


def test_the_script_for_coco_writes_pairs_that_stage_1_learns_from(stage, tmp_path, monkeypatch):
    """As printed on the page, with fewer pictures."""
    script = re.search(r"```python\n(\"\"\"coco.+?)```", PAGES[".assets/own.md"], re.S)[1]
    for long, short in (("1000", "16"), ("2000", "32"), ("64", "16")):
        script = re.sub(rf"\b{long}\b", short, script)
    write_pictures(stage, tmp_path / "train2017", 80)
    notes = {"images": [], "annotations": []}
    for k, file in enumerate(sorted((tmp_path / "train2017").glob("*.png"))):
        notes["images"].append({"id": k, "file_name": file.name})
        caption = file.with_suffix(".txt").read_text()
        notes["annotations"].append({"image_id": k, "caption": caption})
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations/captions_train2017.json").write_text(json.dumps(notes))
    monkeypatch.chdir(tmp_path)
    exec(script, {"__name__": "coco"})
    for wrong in ("--size 16", "--size 32 --batch-size 49"):
        with pytest.raises(SystemExit, match="are fewer than --batch-size or, with --data own,"):
            launch(stage, 1, f"--data own --words 16 --smoke --out coco {wrong}".split())
    launch(stage, 1, "--data own --size 32 --words 16 --smoke --out coco".split())
    pairs = stage(1).open_pairs(stage(1).Path("coco/pairs"))
    assert len(pairs) == 48 and pairs.images.shape[2] == 32
    (key,), (caption,) = pairs.read("key", [0]), pairs.read("caption", [0])
    assert caption == notes["annotations"][int(key)]["caption"]


def slugs(text):
    """The anchors of a Markdown file's headings, as GitHub makes them."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.+)$", text, re.M)}


@pytest.mark.parametrize("page", PAGES)
def test_every_file_and_heading_named_is_there(page):
    text = PAGES[page]
    for link in re.findall(r"\]\(([^)]+)\)", text):
        name, _, heading = link.partition("#")
        if not name.startswith("https:"):
            file = (ROOT / page).parent / name if name else ROOT / page
            assert file.exists(), link
            assert not heading or heading in slugs(file.read_text()), link
    assert all((ROOT / script).exists() for script in re.findall(r"tests/\w+\.py", text))
