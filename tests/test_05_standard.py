"""Stage 5, the standard metrics: against references written apart from them, on random weights."""
import gzip
import pickle
import warnings
import zipfile

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image

from conftest import TORCHRUN, launch, run


def calibrate(net, seed=0):
    """Random weights with features of useful size (the default ones are about 1e-8)."""
    rng = torch.Generator().manual_seed(seed)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=rng) * (2 / fan) ** 0.5
        if isinstance(module, nn.BatchNorm2d):
            for p in (module.weight, module.bias):
                p.data = torch.rand(p.shape, generator=rng) / 2 + 0.5
            module.momentum = None
    net.train()
    with torch.no_grad():
        net(make_images(6, 299, rng).float() / 127.5 - 1)
    return net.eval()


def make_images(n, size, rng):
    """Noise and smooth waves, uint8 (n, 3, size, size)."""
    waves = F.interpolate(torch.rand(n, 3, 5, 5, generator=rng), (size, size), mode="bicubic")
    noise = torch.rand(n, 3, size, size, generator=rng)
    return ((0.6 * waves + 0.4 * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def fid_features(net, x, patched=True):
    """The FID network written out: every pool of the nine blocks as pytorch-fid defines it."""
    def average(h):
        if patched:
            ones = F.avg_pool2d(torch.ones_like(h[:1, :1]), 3, 1, 1)
            return F.avg_pool2d(h, 3, 1, 1) / ones           # a mean over what is not padding
        return F.avg_pool2d(h, 3, 1, 1)

    def block_a(b, h):
        double = b.branch3x3dbl_3(b.branch3x3dbl_2(b.branch3x3dbl_1(h)))
        five = b.branch5x5_2(b.branch5x5_1(h))
        return torch.cat([b.branch1x1(h), five, double, b.branch_pool.conv_bn(average(h))], 1)

    def block_c(b, h):
        seven, double = b.branch7x7_3(b.branch7x7_2(b.branch7x7_1(h))), h
        for k in range(1, 6):
            double = getattr(b, f"branch7x7dbl_{k}")(double)
        return torch.cat([b.branch1x1(h), seven, double, b.branch_pool.conv_bn(average(h))], 1)

    def block_e(b, h, pool):
        three = b.branch3x3_1(h)
        double = b.branch3x3dbl_2(b.branch3x3dbl_1(h))
        return torch.cat([b.branch1x1(h), b.branch3x3_2a(three), b.branch3x3_2b(three),
                          b.branch3x3dbl_3a(double), b.branch3x3dbl_3b(double),
                          b.branch_pool.conv_bn(pool(h))], 1)

    for module in net.modules():                             # around the hooks under test
        if type(module).__name__ == "BasicConv2d":
            module.conv_bn = lambda h, m=module: F.relu(m.bn(m.conv(h)))
    h = net.Conv2d_2b_3x3(net.Conv2d_2a_3x3(net.Conv2d_1a_3x3(x)))
    h = net.Conv2d_4a_3x3(net.Conv2d_3b_1x1(F.max_pool2d(h, 3, 2)))
    h = F.max_pool2d(h, 3, 2)
    for name in ("5b", "5c", "5d"):
        h = block_a(getattr(net, f"Mixed_{name}"), h)
    h = net.Mixed_6a(h)
    for name in ("6b", "6c", "6d", "6e"):
        h = block_c(getattr(net, f"Mixed_{name}"), h)
    h = block_e(net.Mixed_7b, net.Mixed_7a(h), average)
    last = (lambda v: F.max_pool2d(v, 3, 1, 1)) if patched else average
    return block_e(net.Mixed_7c, h, last).mean((2, 3))


@pytest.fixture(scope="module")
def inception(stage):
    return calibrate(stage(5).build_inception())


def test_inception_is_the_fid_network(stage, inception):
    assert len(inception.state_dict()) == 566 and inception.fc.weight.shape == (1008, 2048)
    x = make_images(3, 299, torch.Generator().manual_seed(1)).float() / 127.5 - 1
    with torch.no_grad():
        expected, unpatched = fid_features(inception, x), fid_features(inception, x, False)
        inception.fc = nn.Identity()
        f = inception(x)
    spread = expected.std(0).mean()
    assert (f - expected).abs().max() / spread < 1e-3
    assert (f - unpatched).abs().max() / spread > 1e-2          # a missing patch would be seen


def make_clip_state(width=64, text=64, depth=2, patch=8, size=32, words=600, embedding=16):
    """A random state dict in OpenAI's names; every bias and norm is off its default."""
    rng = torch.Generator().manual_seed(3)

    def block(prefix, d):
        return {f"{prefix}.{name}": shape for name, shape in {
            "ln_1.weight": (d,), "ln_1.bias": (d,), "ln_2.weight": (d,), "ln_2.bias": (d,),
            "attn.in_proj_weight": (3 * d, d), "attn.in_proj_bias": (3 * d,),
            "attn.out_proj.weight": (d, d), "attn.out_proj.bias": (d,),
            "mlp.c_fc.weight": (4 * d, d), "mlp.c_fc.bias": (4 * d,),
            "mlp.c_proj.weight": (d, 4 * d), "mlp.c_proj.bias": (d,)}.items()}
    shapes = {"visual.conv1.weight": (width, 3, patch, patch), "visual.class_embedding": (width,),
              "visual.positional_embedding": (1 + (size // patch) ** 2, width),
              "visual.proj": (width, embedding), "token_embedding.weight": (words, text),
              "positional_embedding": (77, text), "text_projection": (text, embedding),
              "logit_scale": ()}
    for name, d in (("visual.ln_pre", width), ("visual.ln_post", width), ("ln_final", text)):
        shapes |= {f"{name}.weight": (d,), f"{name}.bias": (d,)}
    for k in range(depth):
        shapes |= block(f"visual.transformer.resblocks.{k}", width)
        shapes |= block(f"transformer.resblocks.{k}", text)
    return {name: torch.randn(shape, generator=rng) * (0.5 if len(shape) < 2 else 0.2)
            for name, shape in shapes.items()}


def clip_block(state, prefix, h, mask):
    """One block by plain matrix products, a head at a time."""
    def norm(v, name):
        v = (v - v.mean(-1, keepdim=True)) / (v.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        return v * state[f"{prefix}.{name}.weight"] + state[f"{prefix}.{name}.bias"]

    def linear(v, name, joint="."):
        return v @ state[f"{prefix}.{name}{joint}weight"].T + state[f"{prefix}.{name}{joint}bias"]
    q, k, v = linear(norm(h, "ln_1"), "attn.in_proj", "_").chunk(3, -1)
    heads = [torch.softmax(a @ b.transpose(1, 2) / 8 + mask, -1) @ c for a, b, c in
             zip(q.split(64, -1), k.split(64, -1), v.split(64, -1))]
    h = h + linear(torch.cat(heads, -1), "attn.out_proj")
    hidden = linear(norm(h, "ln_2"), "mlp.c_fc")
    return h + linear(hidden / (1 + torch.exp(-1.702 * hidden)), "mlp.c_proj")


def test_clip_towers(stage):
    state = {name: value.double() for name, value in make_clip_state(128, 64).items()}
    net = stage(5).load_strictly(stage(5).Clip(state).double(), state, "clip").eval()
    ids = torch.randint(1, 500, (3, 77), generator=torch.Generator().manual_seed(1))
    ids[:, 20] = 599                                             # end of text
    h = state["token_embedding.weight"][ids] + state["positional_embedding"]
    mask = torch.triu(torch.full((77, 77), -torch.inf), 1).double()
    for k in range(2):
        h = clip_block(state, f"transformer.resblocks.{k}", h, mask)
    h = F.layer_norm(h, (64,), state["ln_final.weight"], state["ln_final.bias"])
    expected = h[:, 20] @ state["text_projection"]
    with torch.no_grad():
        text = net.encode_text(ids)
        changed = ids.clone()
        changed[:, 40:] = 7                                      # after the end nothing matters
        assert torch.allclose(net.encode_text(changed), text)
    assert torch.allclose(text, expected, atol=1e-9)

    x = torch.randn(2, 3, 32, 32).double()
    v = {name.removeprefix("visual."): value for name, value in state.items()}
    weight = state["visual.conv1.weight"]
    patches = x.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 1, 4, 5).reshape(2, 16, -1)
    h = torch.cat([state["visual.class_embedding"].expand(2, 1, -1),
                   patches @ weight.reshape(len(weight), -1).T], 1)
    h = F.layer_norm(h + state["visual.positional_embedding"], (128,),
                     v["ln_pre.weight"], v["ln_pre.bias"])
    for k in range(2):
        h = clip_block(state, f"visual.transformer.resblocks.{k}", h, 0)
    h = F.layer_norm(h[:, 0], (128,), v["ln_post.weight"], v["ln_post.bias"])
    with torch.no_grad():
        assert torch.allclose(net.visual(x), h @ state["visual.proj"], atol=1e-9)


def test_weights_of_another_network_are_refused_by_name(stage, tmp_path):
    state = make_clip_state()
    short = {name: value for name, value in state.items() if name != "visual.proj"}
    with pytest.raises(SystemExit, match="weights.pt holds other weights.*visual.proj"):
        stage(5).load_strictly(stage(5).Clip(state), short, "weights.pt")
    torch.save(state, tmp_path / "clip.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "clip.pt").read_bytes()[:5000])
    with pytest.raises(SystemExit, match="cut.pt is no file of weights"):
        stage(5).load_state(tmp_path / "cut.pt")
    assert torch.equal(stage(5).load_state(tmp_path / "clip.pt")["visual.proj"],
                       state["visual.proj"])


def test_public_weights_are_fetched_once_and_checked(stage, tmp_path, monkeypatch):
    """No network: the address and the option are named. Other bytes than the public: refused."""
    def fail(*args, **kwargs):
        raise OSError("no network")
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(SystemExit, match="ViT-B-32.pt could not be fetched.*--clip"):
        stage(5).find_weights("clip", None)
    with pytest.raises(SystemExit, match="--clip-vocab nowhere: no such file"):
        stage(5).find_weights("clip_vocab", "nowhere")
    (tmp_path / "checkpoints" / "ViT-B-32.pt").write_bytes(b"half of it")
    with pytest.raises(SystemExit, match="SHA-256 differs"):
        stage(5).find_weights("clip", None)


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4).half())
        self.table = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        return self.inner[0](x) + self.inner[1].weight.float() + self.table.sum()


@pytest.fixture()
def archive(tmp_path):
    """A TorchScript archive of a Leaf, and that Leaf."""
    leaf, path = Leaf(), tmp_path / "leaf.pt"
    with warnings.catch_warnings(action="ignore"):         # of what is deprecated
        torch.jit.save(torch.jit.trace(leaf, torch.randn(2, 3)), str(path))
    return path, leaf


def rewrite(path, file, change):
    """A copy of a zip whose files of this name end in what `change` makes of their bytes."""
    copy = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(copy, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            new.writestr(name, change(data) if name.endswith(file) else data)
    return copy


def test_archives_are_read_bit_by_bit_and_without_a_warning(stage, archive):
    path, leaf = archive
    with warnings.catch_warnings(action="error"):
        state = stage(5).load_state(path)
    assert state.keys() == leaf.state_dict().keys()
    for name, value in leaf.state_dict().items():
        assert state[name].dtype == value.dtype and torch.equal(state[name], value)


@pytest.mark.parametrize("file", ["/data.pkl", "/constants.pkl", ".py"])
def test_no_python_in_an_archive_is_run(stage, archive, tmp_path, file):
    """Neither what a pickle calls, in either of its two, nor its source as Python."""
    sprung = tmp_path / "sprung"

    class Trap:
        def __reduce__(self):
            return (open, (str(sprung), "w"))
    trap = f"open({str(sprung)!r}, 'w')\n".encode() if file == ".py" else pickle.dumps(Trap(), 2)
    changed = rewrite(archive[0], file, lambda data: trap + data)
    with pytest.raises(SystemExit, match="changed.pt is no file of weights: .") as stop:
        stage(5).load_state(changed)
    assert not sprung.exists() and "\n" not in stop.value.code


@pytest.mark.parametrize("damage", ["cut", "a byte of a tensor", "without its tree"])
def test_damaged_archives_are_refused_in_one_line(stage, archive, damage):
    path, leaf = archive
    data = path.read_bytes()
    if damage == "cut":
        path.write_bytes(data[:len(data) // 2])
    elif damage == "a byte of a tensor":
        table = data.index(leaf.table.detach().numpy().tobytes())
        path.write_bytes(data[:table] + bytes([data[table] ^ 255]) + data[table + 1:])
    else:
        path = rewrite(path, "/data.pkl", lambda data: b"")
    with pytest.raises(SystemExit, match=f"{path.name} is no file of weights: .") as stop:
        stage(5).load_state(path)
    assert "\n" not in stop.value.code


@pytest.fixture()
def tokenizer(stage, tmp_path):
    """A vocabulary of seven merges, in the order in which they were learnt."""
    merges = ["h e", "l l", "he ll", "hell o</w>", "' s</w>", "a b", "b b"]
    (tmp_path / "bpe.txt").write_text("#version\n" + "\n".join(merges) + "\n", encoding="utf-8")
    return stage(5).ClipTokenizer(tmp_path / "bpe.txt")


def test_tokenizer_merges_and_rules(tokenizer):
    encode, ids = tokenizer.encode, tokenizer.ids
    assert ids["!"] == 0 and ids["!</w>"] == 256 and ids["he"] == 512
    assert encode("HELLO  hello") == [ids["hello</w>"]] * 2                  # case, spaces
    assert encode("hello's") == [ids["hello</w>"], ids["'s</w>"]] == encode("hello’s")
    assert encode("12") == [ids["1</w>"], ids["2</w>"]]                      # digits stand alone
    assert encode("ab!?") == [ids["a"], ids["b</w>"], ids["!"], ids["?</w>"]]
    assert encode("abbc") == [ids["ab"], ids["b"], ids["c</w>"]]             # a b before b b
    assert encode("a&amp;amp;b") == [ids["a</w>"], ids["&</w>"], ids["b</w>"]]
    assert len(encode("é")) == 2 and encode("<|endoftext|>") == []           # two bytes; no escape
    assert encode("10²")[:2] == [ids["1</w>"], ids["0</w>"]] and len(encode("10²")) == 4


def test_tokenizer_keeps_the_end_when_it_cuts(tokenizer):
    start, end = len(tokenizer.ids), len(tokenizer.ids) + 1
    table = tokenizer(["hello", "1" * 75, "1" * 76, "1" * 500])
    assert table.shape == (4, 77) and table[0, :4].tolist() == [
        start, tokenizer.ids["hello</w>"], end, 0]
    assert all(row[76] == end and row[0] == start for row in table[1:])


def test_streaming_moments_equal_two_passes(stage):
    f = torch.randn(103, 7).double() * 3 + 5
    for size in (1, 7, 50, 200):
        found = stage(5).Moments(7)
        for part in f.split(size):
            found.add(part)
        n, mu, S = found.finish()
        assert n == 103 and np.allclose(mu, f.mean(0), atol=1e-12)
        assert np.allclose(S, np.cov(f.numpy(), rowvar=False), atol=1e-10)
    one = stage(5).Moments(7)
    one.add(f[:1])
    with pytest.raises(SystemExit, match="at least two"):
        one.finish()


@pytest.fixture()
def weights(stage, inception, tmp_path):
    """Flags that name weight files as the public ones are laid out, with random contents."""
    calibrated = stage(5).build_inception()
    calibrated.load_state_dict(inception.state_dict() | {
        "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)})
    torch.save(calibrated.state_dict(), tmp_path / "inception.pt")
    torch.save(make_clip_state(words=515), tmp_path / "clip.pt")     # 512 symbols, a merge, two ends
    (tmp_path / "bpe.txt").write_text("#version\nh e\n")
    return [f"--inception={tmp_path}/inception.pt", f"--clip={tmp_path}/clip.pt",
            f"--clip-vocab={tmp_path}/bpe.txt"]


def test_standard_judge_has_the_interface_of_the_mini_one(stage, weights):
    """Images in [-1, 1] are measured as the files that they would be saved as."""
    args = stage(5).parse_args(["--metrics=standard", *weights])
    judge = stage(5).StandardJudge(args, torch.device("cpu"))
    pixels = make_images(4, 24, torch.Generator().manual_seed(2))
    f, unit = judge.embed_images(pixels / 127.5 - 1)
    again, same = judge.embed_pixels(list(pixels))
    assert torch.allclose(f, again, atol=1e-4) and torch.allclose(unit, same, atol=1e-5)
    assert f.shape == (4, 2048) and torch.allclose(unit.norm(dim=1), torch.ones(4))
    assert judge.embed_captions(["he", "he he"]).shape == (2, 16)


@pytest.mark.slow
def test_evaluate_tool_on_folders(stage, weights, tmp_path, capsys):
    """Statistics saved and reused; the folder against itself is at distance 0; two processes count
    every image once; captions give a CLIP score."""
    rng = torch.Generator().manual_seed(5)
    for name, n in (("drawn", 5), ("real", 4)):
        (tmp_path / name).mkdir()
        for k, image in enumerate(make_images(n, 40, rng)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name / f"{k}.png")
            (tmp_path / name / f"{k}.txt").write_text("he he")
    (tmp_path / "drawn/broken.png").write_bytes(b"no")
    weights.append(f"--out={tmp_path}/out")
    for extra in ([f"--reference={tmp_path}/real", f"--save-statistics={tmp_path}/s.npz"],
                  [f"--reference={tmp_path}/s.npz"]):
        flags = [f"--evaluate={tmp_path}/drawn", *extra, *weights]
        stage(1).launch(stage(5).main, stage(5).parse_args(flags))
    said = capsys.readouterr().out
    first, second = [float(line.split()[1]) for line in said.splitlines() if line[:3] == "FID"]
    assert first > 1e-3 > abs(second) and "of 5 images" in said and "bias" in said
    assert "of 5 captioned images" in said and "skipped 1 (unreadable image" in said
    assert set(np.load(tmp_path / "s.npz").files) == {"mu", "sigma", "count"}
    done = run(f"05_train_eval.py --evaluate {tmp_path}/drawn --reference {tmp_path}/real "
               + " ".join(weights), TORCHRUN)
    assert "of 5 images" in done.stdout, done.stderr
    third = float(done.stdout.split("FID ")[-1].split()[0])
    assert third == pytest.approx(first, rel=1e-3)


class Blind:
    """A judge whose features are the mean colours, in 2048 numbers: what is tested is the rest."""

    def __init__(self, args, device):
        pass

    def embed_pixels(self, images):
        f = torch.stack([image.float().mean((1, 2)) for image in images]).repeat(1, 683)[:, :2048]
        return f, F.normalize(f[:, :4], dim=1)

    def embed_captions(self, captions):
        return F.normalize(torch.ones(len(captions), 4), dim=1)


def evaluate(stage, tmp_path, *flags, images=3, captions=0):
    """--evaluate of so many images, the first of them captioned, in a folder of its own."""
    folder = tmp_path / f"drawn-{images}-{captions}"
    folder.mkdir(exist_ok=True)
    for k, image in enumerate(make_images(images, 16, torch.Generator().manual_seed(9))):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{k}.png")
        if k < captions:
            (folder / f"{k}.txt").write_text("a caption")
    launch(stage, 5, ["--evaluate", str(folder), "--out", str(tmp_path / "out"), *flags])


STATISTICS = {"other names": {"mean": np.zeros(2048), "cov": np.eye(2048)}, "no name": None,
              "narrow": {"mu": np.zeros(64), "sigma": np.eye(64)}, "cut": {},
              "two networks": {"mu": np.zeros(2048), "sigma": np.eye(64)},
              "not finite": {"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "a table": 0}


@pytest.mark.parametrize("kind", STATISTICS)
def test_statistics_are_read_before_any_image(stage, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(stage(5), "StandardJudge", None)
    held, file = STATISTICS[kind], tmp_path / "s.NPZ"
    with open(file, "wb") as stream:
        if kind == "a table":
            np.save(stream, np.zeros(3))
        elif kind == "no name":
            np.savez(stream, np.zeros(2048))
        else:
            np.savez(stream, **held or {"mu": np.zeros(2048)})
    if kind == "cut":
        file.write_bytes(file.read_bytes()[:900])
    with pytest.raises(SystemExit, match="s.NPZ is no .npz of statistics"):
        evaluate(stage, tmp_path, f"--reference={file}")


def test_every_measurement_has_its_line(stage, tmp_path, monkeypatch, capsys):
    """One captioned image, none at all, statistics that are saved, and a distance of nearly 0."""
    monkeypatch.setattr(stage(5), "StandardJudge", Blind)
    with pytest.raises(SystemExit, match="nowhere/s.npz: there is no such folder"):
        evaluate(stage, tmp_path, f"--save-statistics={tmp_path}/nowhere/s.npz")
    evaluate(stage, tmp_path, images=1, captions=1)
    assert "of 1 captioned images" in capsys.readouterr().out
    evaluate(stage, tmp_path)
    assert "3 images; --reference would give their FID, captions" in capsys.readouterr().out
    evaluate(stage, tmp_path, f"--save-statistics={tmp_path}/s.NPZ")
    monkeypatch.setattr(stage(5), "frechet_distance", lambda *_: -1e-9)
    evaluate(stage, tmp_path, f"--reference={tmp_path}/s.NPZ")
    assert "FID 0.0000 of 3 images" in capsys.readouterr().out
    assert stage(5).parse_args(["--evaluate", "x"]).batch_size % 3 == 0      # any process count


@pytest.fixture()
def judge_with(stage, monkeypatch, tmp_path):
    """judge_with(state, vocabulary): StandardJudge on these files, without its Inception."""
    monkeypatch.setattr(stage(5), "build_inception", lambda: nn.Module())
    torch.save({"x": torch.zeros(1)}, tmp_path / "inception.pt")
    monkeypatch.setattr(stage(5), "load_strictly", lambda net, state, path: net)

    def judge(state, vocabulary=b"#version\nh e\n"):
        torch.save(state, tmp_path / "clip.pt")
        (tmp_path / "bpe.gz").write_bytes(vocabulary)
        flags = [f"--{name}={tmp_path}/{file}" for name, file in (
            ("inception", "inception.pt"), ("clip", "clip.pt"), ("clip-vocab", "bpe.gz"))]
        return stage(5).StandardJudge(stage(5).parse_args(flags), torch.device("cpu"))
    return judge


def test_side_files_that_cannot_be_meant_are_refused(judge_with, capsys):
    state = make_clip_state(words=515)
    judge_with(state)
    assert "does not say with which activation" in capsys.readouterr().out
    whole = gzip.compress(b"#version\nh e\n" * 99)
    for wrong, vocabulary, message in (
            (state, b"#version\nh e\nl l\n", "516 tokens, .*clip.pt has 515 rows"),
            (state, whole[:40], "bpe.gz is no vocabulary"), (state, b"\xff\xfe", "no vocabulary"),
            ({"epoch": 3, "state_dict": state}, None, "clip.pt holds no weights by name"),
            (torch.zeros(3), None, "clip.pt holds no weights by name"),
            ({"visual.conv1.weight": torch.zeros(3)}, None, "is not a CLIP"),
            ({}, None, "holds no weights"), (make_clip_state(1280, words=515), None, "1280 is none"),
            (make_clip_state(160, words=515), None, "width 160 is none of OpenAI's")):
        with pytest.raises(SystemExit, match=message):
            judge_with(wrong, *[vocabulary] if vocabulary else [])
