"""Stage 5, the standard metrics: against references written apart from them, on random weights."""
import functools
import gzip
import hashlib
import warnings
from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.models import inception_v3


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
        net(make_images(3, 299, rng).float() / 127.5 - 1)
    return net.eval()


def make_images(n, size, rng):
    """Noise and smooth waves, uint8 (n, 3, size, size)."""
    waves = F.interpolate(torch.rand(n, 3, 5, 5, generator=rng), (size, size), mode="bicubic")
    noise = torch.rand(n, 3, size, size, generator=rng)
    return ((0.6 * waves + 0.4 * noise).clamp(0, 1) * 255).round().to(torch.uint8)


def fid_features(net, x, patched=True):
    """torchvision's own network with the numbers of `net`, where the nine pools that average over
    padding are replaced as pytorch-fid defines them."""
    average, calls = F.avg_pool2d, []

    def pool(h, **how):
        calls.append(how)
        if len(calls) == 9:
            return F.max_pool2d(h, 3, 1, 1)
        return average(h, **how) / average(torch.ones_like(h), **how)  # a mean without the padding
    plain = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    plain.load_state_dict(net.state_dict(), strict=False)
    plain.fc = nn.Identity()
    with mock.patch.object(F, "avg_pool2d", pool if patched else average):
        return plain.eval()(x)


@pytest.fixture(scope="module")
def inception(stage):
    return calibrate(stage(5).build_inception())


def test_inception_is_the_fid_network(stage, inception):
    assert len(inception.state_dict()) == 566 and inception.fc.weight.shape == (1008, 2048)
    x = make_images(2, 299, torch.Generator().manual_seed(1)).float() / 127.5 - 1
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
    net = stage(5).Clip((128, 2, 8, 32, 16), (64, 2), (600, 77)).double().eval()
    net.load_state_dict(stage(5).rename_parts(state))
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


@pytest.fixture()
def tokenizer(stage, tmp_path):
    """A vocabulary of seven merges, in the order in which they were learnt."""
    merges = ["h e", "l l", "he ll", "hell o</w>", "' s</w>", "a b", "b b"]
    text = "\n".join(["#version", *merges, ""])
    (tmp_path / "bpe.gz").write_bytes(gzip.compress(text.encode()))
    return stage(5).ClipTokenizer(tmp_path / "bpe.gz")


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
    start, end = len(ids), len(ids) + 1                                      # kept in a cut caption
    table = tokenizer(["hello", "1" * 75, "1" * 76, "1" * 500])
    assert table.shape == (4, 77) and table[0, :4].tolist() == [start, ids["hello</w>"], end, 0]
    assert all(row[76] == end and row[0] == start for row in table[1:])


# ---- the public files ------------------------------------------------------------------------
def save_archive(path, state):
    """A TorchScript archive, as OpenAI's files are: half precision, and three whole numbers."""
    net = nn.Identity()
    for name in ("input_resolution", "context_length", "vocab_size"):
        net.register_buffer(name, torch.tensor(5))
    for name, value in state.items():
        *places, last = name.split(".")
        holder = net
        for place in places:
            if not hasattr(holder, place):
                holder.add_module(place, nn.Identity())
            holder = getattr(holder, place)
        holder.register_buffer(last, value.half())
    with warnings.catch_warnings(action="ignore"):         # of what is deprecated
        torch.jit.save(torch.jit.trace(net, torch.zeros(1)), str(path))


@pytest.fixture(scope="module")
def files(stage, inception, tmp_path_factory):
    """Files as the public ones are laid out, of random contents."""
    folder = tmp_path_factory.mktemp("weights")
    state = inception.state_dict() | {"fc.weight": torch.zeros(1008, 2048),
                                      "fc.bias": torch.zeros(1008)}
    torch.save(state, folder / "inception.pth")
    save_archive(folder / "clip.pt", make_clip_state(words=515))   # 512 symbols, a merge, two ends
    (folder / "bpe.gz").write_bytes(gzip.compress(b"#version\nh e\n"))
    return folder


@pytest.fixture()
def weights(stage, files, tmp_path, monkeypatch):
    """A folder with links to these files; their digests and addresses stand in WEIGHTS."""
    names = {"inception": "inception.pth", "clip": "clip.pt", "clip_vocab": "bpe.gz"}
    for what, name in names.items():
        (tmp_path / name).symlink_to(files / name)
        digest = hashlib.sha256((files / name).read_bytes()).hexdigest()
        monkeypatch.setitem(stage(5).WEIGHTS, what, (f"https://example.org/files/{name}", digest))
    small = functools.partial(stage(5).Clip, (64, 2, 8, 32, 16), (64, 2), (515, 77))
    monkeypatch.setattr(stage(5), "Clip", small)
    monkeypatch.setattr(stage(5), "SIDE", 32)
    return tmp_path


def test_standard_judge_has_the_interface_of_the_mini_one(stage, weights):
    """Images in [-1, 1] are measured as the files that they would be saved as; the features are
    those of the networks with the files' numbers, in any batch."""
    judge = stage(5).StandardJudge(str(weights), torch.device("cpu"))
    pixels = make_images(4, 24, torch.Generator().manual_seed(2))
    f, unit = judge.embed_images(pixels / 127.5 - 1)
    again, same = judge.embed_images(pixels[2:] / 127.5 - 1)
    assert torch.allclose(f[2:], again, atol=1e-4) and torch.allclose(unit[2:], same, atol=1e-5)
    assert f.shape == (4, 2048) and torch.allclose(unit.norm(dim=1), torch.ones(4))
    assert f.std(0).mean() > 0.01 and (unit @ unit.T)[0, 1] < 0.9999
    large = F.interpolate(pixels / 255, (299, 299), mode="bilinear", align_corners=False)
    with torch.no_grad():
        assert torch.allclose(judge.inception(2 * large - 1), f, atol=1e-3)
    state = {name: v.half().float() for name, v in make_clip_state(words=515).items()}
    assert torch.equal(judge.clip.visual.proj, state["visual.proj"])
    torch.set_float32_matmul_precision("high")             # as an arm may have left it
    texts = judge.embed_captions(["he", "he he", "he"])
    assert torch.get_float32_matmul_precision() == "highest"
    assert texts.shape == (3, 16) and torch.equal(texts[0], texts[2])
    assert not torch.allclose(texts[0], texts[1])


@pytest.mark.parametrize("what, damage, message", [
    ("clip", "cut", "clip.pt is not the public file .SHA-256 differs"),
    ("inception", "bit", "inception.pth is not the public file .SHA-256 differs"),
    ("clip", "gone", "clip.pt is missing: download it from https://example.org/")])
def test_files_are_checked_before_any_is_read(stage, weights, monkeypatch, what, damage, message):
    """A pickle that is not the public one could run anything."""
    file = weights / stage(5).WEIGHTS[what][0].rpartition("/")[2]
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[:999] if damage == "cut" else data[:-1] + bytes([data[-1] ^ 1]))
    for reader in ("torch.load", "torch.jit.load", "gzip.decompress"):
        monkeypatch.setattr(reader, None)
    with pytest.raises(SystemExit, match=message) as stop:
        stage(5).StandardJudge(str(weights), torch.device("cpu"))
    assert "\n" not in stop.value.code
