"""Corpora larger than memory: the index, reading from tars, streaming scores, writing shards."""
import csv
import io
import shlex
import shutil
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, launch, run


@pytest.fixture(scope="module")
def tars(stage, tmp_path_factory):
    """1,300 toy pairs in three tars, more than the workers' threshold, and the pairs themselves."""
    folder, pairs = tmp_path_factory.mktemp("tars"), stage(1).draw_toy(1300, 16, 7, "train")
    for number, rows in enumerate(np.array_split(np.arange(1300), 3)):
        with tarfile.open(folder / f"train-{number}.tar", "w") as tar:
            for row in rows:
                file = io.BytesIO()
                Image.fromarray(pairs.images[row].permute(1, 2, 0).numpy()).save(file, "PNG")
                caption = pairs.captions[row].encode()
                for kind, data in ((".png", file.getvalue()), (".txt", caption),
                                   (".cls", b"kept as it is")):
                    member = tarfile.TarInfo(pairs.keys[row] + kind)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    return folder, pairs


def test_index_finds_every_pair_and_reads_it_in_place(stage, tars):
    """Random rows through the workers: the same pictures, captions and keys as were packed."""
    folder, pairs = tars
    shards = stage(1).open_pairs(folder / "train-*.tar", 16, 8)
    assert len(shards) == 1300 and shards.entries.itemsize == 24
    batches = np.random.default_rng(0).permutation(1300).reshape(10, 130)
    for (rows, part), expected in zip(shards.parts(iter(batches)), batches):
        assert (rows == expected).all() and part.keys == pairs.name(rows)
        assert torch.equal(part.images, pairs.images[rows])
        assert torch.equal(part.tokens, pairs.tokens[rows])
    (_, part), = shards.parts([[5, 900]])
    assert part.keys == pairs.name([5, 900]) and torch.equal(part.images, pairs.images[[5, 900]])
    keys = [pairs.keys[900], "nobody", pairs.keys[5]]
    assert stage(1).find_rows(shards, keys).tolist() == [900, -1, 5]
    for kind in (np.array(keys), np.array([stage(1).hash_key(key) for key in keys], "u8")):
        assert stage(1).find_rows(shards, kind).tolist() == [900, -1, 5]


def test_index_is_kept_until_a_shard_changes(stage, tars, tmp_path, monkeypatch):
    folder = shutil.copytree(tars[0], tmp_path / "tars")
    assert len(stage(1).open_pairs(folder, 16, 8, tmp_path)) == 1300
    with monkeypatch.context() as patch:
        patch.setattr(stage(1), "index_shard", None)
        assert len(stage(1).open_pairs(folder, 16, 8, tmp_path)) == 1300
    (folder / "train-2.tar").unlink()
    assert len(stage(1).open_pairs(folder, 16, 8, tmp_path)) < 1300


@pytest.mark.slow
def test_resident_or_from_disk_gives_the_same_ratings(stage, tars, tmp_path):
    """The chain on tars that fit into memory, and with a memory of 0 bytes."""
    folder, _ = tars
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = []
    for name, memory in (("resident", "2"), ("disk", "0")):
        out = tmp_path / name
        for number, flags in ((1, ["--data", str(folder)]), (2, []), (3, ["--baselines"])):
            launch(stage, number, ["--smoke", "--out", str(out), "--memory", memory, *flags])
        with open(out / "ratings.csv", newline="") as file:
            found.append(list(csv.DictReader(file)))
    torch.set_num_threads(threads)
    assert [row["key"] for row in found[0]] == [row["key"] for row in found[1]]
    for column in ("instance", "group", "loss", "difference"):
        one, two = ([float(row[column]) for row in rows] for rows in found)
        assert np.allclose(one, two, atol=1e-5) and np.ptp(one) > 0
    launch(stage, 5, ["--smoke", "--seeds", "1", "--out", str(out), "--memory", "0"])
    assert (out / "results.md").exists()


@pytest.mark.slow
def test_new_shards_hold_the_selected_pairs_byte_for_byte(stage, tars, tmp_path):
    folder, pairs = tars
    out = tmp_path / "out"
    launch(stage, 1, ["--smoke", "--data", str(folder), "--out", str(out)])
    lines = [f"{key},{k}" for k, key in enumerate(pairs.keys)]
    (out / "ratings.csv").write_text("\n".join(["key,rating", *lines]))
    done = run(f"04_select.py --method topk --keep 0.1 --out {out} --write-shards {tmp_path}/new")
    assert done.returncode == 0 and "130 of 130 pairs" in done.stdout, done.stderr
    old, new = {}, {}
    for place, files in ((folder, old), (tmp_path / "new", new)):
        for path in sorted(place.glob("*.tar")):
            with tarfile.open(path) as tar:
                files.update((member.name, tar.extractfile(member).read()) for member in tar)
    assert len(new) == 3 * 130 and all(old[name] == data for name, data in new.items())
    assert {name.split(".")[0] for name in new} == set(pairs.keys[-130:])
    assert len(stage(1).open_pairs(tmp_path / "new", 16, 8)) == 130
    np.save(out / "r.npy", np.arange(1300.0))                  # a .npy rates the rows of the corpus
    run(f"04_select.py --method topk --keep 7 --out {out} --ratings {out}/r.npy "
        f"--write-shards {tmp_path}/rows")
    assert stage(1).open_pairs(tmp_path / "rows", 16, 8).name(range(7)) == pairs.keys[-7:]
    np.save(out / "r.npy", np.arange(1170.0))                  # of the training pairs alone, say
    with pytest.raises(SystemExit, match="are of 1170 pairs and .* has 1300: .* a CSV of keys"):
        launch(stage, 4, ["--out", str(out), "--ratings", f"{out}/r.npy", "--write-shards",
                          f"{tmp_path}/other"])


@pytest.mark.slow
def test_train_the_rater_on_a_sample_rate_everything_take_home_the_half(stage, tars, tmp_path,
                                                                        monkeypatch):
    """The line of own.md, on three tars of which the first is the sample."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tars[0], tmp_path / "shards")
    line = next(line for line in (ROOT / ".assets/own.md").read_text().splitlines()
                if "--write-shards half" in line and line.startswith("python 01"))
    line = line.replace("train-00*", "train-0*").replace("trusted/", "shards/train-1.tar")
    for command in line.split(" && "):
        _, file, *flags = shlex.split(command)
        launch(stage, int(file[1]), [*flags, "--smoke"])
    _, ratings = stage(4).read_ratings(tmp_path / "big/ratings-of-shards-train.csv",
                                       "rating,contrast")
    half = stage(1).open_pairs(tmp_path / "half", 16, 8)
    expected = np.sort(np.argsort(-ratings, kind="stable")[:650])
    assert half.name(range(650)) == [tars[1].keys[row] for row in expected]
    assert not (tmp_path / "big/ratings.csv").exists()


def test_a_selection_of_pairs_on_disk(stage, tars, tmp_path, monkeypatch, capsys):
    """Whose strata are not known before they are read: no pair is taken for planted dirt."""
    out = tmp_path / "out"
    launch(stage, 1, ["--smoke", "--data", str(tars[0]), "--out", str(out)])
    train = stage(1).load_data(stage(1).load_proxy(out)[0], "cpu")[0]
    (out / "s.csv").write_text("\n".join(["key", *train.keys[:40]]))
    np.save(out / "s.npy", np.arange(40))
    launch(stage, 5, ["--smoke", "--seeds", "1", "--out", str(out), "--memory", "0", "--selected",
                      f"{out}/s.csv", f"{out}/s.npy"])
    said = capsys.readouterr().out
    assert "planted" not in said and "wrote" in said
    with open(out / "results.csv", newline="") as file:
        pairs = {row["arm"]: row["pairs"] for row in csv.DictReader(file)}
    assert list(pairs.values()) == [str(len(train)), "40", "40", "40"]


def test_duplicate_keys_are_counted_and_the_first_named(stage, tars, tmp_path, capsys):
    for name in ("a.tar", "b.tar"):
        shutil.copy(tars[0] / "train-0.tar", tmp_path / name)
    assert len(stage(1).open_pairs(tmp_path, 16, 8)) == 434
    assert f"skipped 434 (key seen before), first {tars[1].keys[0]}" in capsys.readouterr().out


def test_every_training_pair_reaches_the_rater(stage, monkeypatch, tmp_path):
    """One epoch of stage 2 shows all training pairs, not only as many as validation has."""
    shown = {0: [], 1: []}
    args = stage(2).parse_args(["--smoke", "--out", str(tmp_path)])
    args.steps = 256 // args.batch_size
    pairs, val = (stage(1).draw_toy(n, 16, 0, split) for n, split in ((256, "train"), (64, "val")))

    def meta_step(nets, opts, train, val, rng, args):
        for k, (x, _) in enumerate((train, val)):
            shown[k] += [image.sum().item() for image in x]
        return torch.zeros(8)
    monkeypatch.setattr(stage(2), "meta_step", meta_step)
    nets = {name: stage(1).DiT(16, 4, 16, 1, 8) for name in ("proxy", "ref")}
    nets["rater"] = stage(2).Rater(16, 4, 8, 16, 1)
    stage(2).learn(nets, pairs, val, args, pairs.batch(range(8)), stage(1).Progress())
    stage(1).Progress.running = False
    assert len(set(shown[0])) == 256 and len(set(shown[1])) == 64
